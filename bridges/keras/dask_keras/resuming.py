"""What a training goes on from where it was interrupted: its state and place, in a checkpoint without pickles."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from dask_bridges import safekeeping
from dask_bridges.checkpoints import Checkpoint, Checkpoints
from dask_bridges.errors import DataError
from dask_bridges.processes import ChildMember
from dask_keras.synchronous import Replicas, host, moving
from dask_tf.training.checkpoint import arrays, dump

__all__ = ["InWorkers", "Keeper", "Keeping", "Position", "Resumed", "at"]

#: Of a checkpoint, what is the same on all ranks, and most of it.
SHARED = "variables.npz"


class InWorkers:
    """Checkpoints in the memory of the ranks' Dask workers, each of which has the newest; read as `Checkpoints` are.

    Parameters
    ----------
    newest : Checkpoint, optional
        What the client has collected from the workers that are left.
    """

    url = "memory://"

    def __init__(self, newest: Checkpoint | None = None) -> None:
        self._newest = newest

    def check(self) -> None:
        """There is memory."""

    def latest(self) -> int | None:
        """Step of the newest; None without one."""
        return None if self._newest is None else self._newest.step

    def load(self, step: int | None = None) -> Checkpoint:
        """The newest."""
        assert self._newest is not None
        return self._newest

    def of_rank(self, rank: int) -> InWorkers:
        """What a rank is told: what is the same for all goes to rank 0, from which the others have it."""
        if rank == 0 or self._newest is None:
            return self
        files = {name: content for name, content in self._newest.files.items() if name != SHARED}
        return InWorkers(replace(self._newest, files=files))

    async def collect(self, client: Client, gang: str, workers: Sequence[str], *, wanted: bool = True) -> None:
        """Have what the ranks of a gang that has ended have kept; they forget it, also where it is not wanted."""
        found: Checkpoint | None = await safekeeping.collect(client, gang, workers, wanted=wanted)
        self._newest = found or self._newest


def at(checkpoint: str | Path | Checkpoints) -> Checkpoints | InWorkers:
    """The checkpoints of `fit`'s argument."""
    checkpoints = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    return InWorkers() if checkpoints.url.startswith("memory:") else checkpoints


@dataclass(frozen=True)
class Keeping:
    """Where and when checkpoints are kept, and which one to go on from.

    Attributes
    ----------
    checkpoints : Checkpoints or InWorkers
    every : int or None
        Batches between two.
    seconds : float or None
        Seconds between two. With neither, one is kept at the end of each epoch.
    step : int or None
        Of the checkpoint to go on from.
    parts : tuple of tuple of int
        Numbers of the partitions of each rank.
    """

    checkpoints: Checkpoints | InWorkers
    every: int | None = None
    seconds: float | None = None
    step: int | None = None
    parts: tuple[tuple[int, ...], ...] = ()

    def of_rank(self, rank: int) -> Keeping:
        """What that rank is told."""
        kept = self.checkpoints
        return replace(self, checkpoints=kept.of_rank(rank)) if isinstance(kept, InWorkers) else self


@dataclass
class Position:
    """How far a training is.

    Attributes
    ----------
    epoch : int
        The epoch that is under way, or comes next.
    batch : int
        Batches of it that are over.
    stopped : bool
        Whether a callback has ended it.
    history : dict of str to list of float
    epochs : list of int
        As of the `History` callback.
    """

    epoch: int
    batch: int = 0
    stopped: bool = False
    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)


class Keeper:
    """Keeps checkpoints, as all ranks together.

    Parameters
    ----------
    member : ChildMember
    keeping : Keeping
    replicas : Replicas
    callbacks : sequence of Callback
        The user's, on rank 0.
    """

    def __init__(self, member: ChildMember, keeping: Keeping, replicas: Replicas, callbacks: Sequence[Any]) -> None:
        self._member, self._keeping, self._replicas, self._callbacks = member, keeping, replicas, callbacks
        self._kept, self._at = replicas.step, time.monotonic()

    @property
    def by_the_clock(self) -> bool:
        """Whether rank 0 alone knows when it is time."""
        return self._keeping.seconds is not None

    def due(self, *, end_of_epoch: bool) -> bool:
        """Whether it is time for a checkpoint."""
        keeping = self._keeping
        if keeping.seconds is not None and time.monotonic() - self._at >= keeping.seconds:
            return True
        if keeping.every is not None:
            return self._replicas.step - self._kept >= keeping.every
        return end_of_epoch and keeping.seconds is None

    def keep(self, model: Any, position: Position) -> None:
        """Keep the state of all ranks: rank 0 in a store, or each in the memory of its worker."""
        checkpoints = self._keeping.checkpoints
        if isinstance(checkpoints, InWorkers) and not position.batch:
            # What rank 0's callbacks have changed at the end of an epoch, the others hear of when the next one begins.
            self._replicas.follow(_shared(model))
        of_ranks = self._replicas.collective.all_gather(dump([*map(host, _own(model)), *self._replicas.pending]))
        self._kept, self._at = self._replicas.step, time.monotonic()
        if self._replicas.rank and not isinstance(checkpoints, InWorkers):
            return
        variables = _shared(model)
        scalars, tensors = _states(self._callbacks)
        files = {
            SHARED: dump([host(variable) for variable in variables]),
            "callbacks.npz": dump(tensors),
            **{f"rank-{rank}.npz": state for rank, state in enumerate(of_ranks)},
        }
        meta = {
            **asdict(position),
            "variables": [list(variable.shape) for variable in variables],
            "callbacks": scalars,
            "rows": list(self._replicas.shares.rows),
            "parts": self._keeping.parts,
        }
        if isinstance(checkpoints, InWorkers):
            self._keep_here(files, meta)
        else:
            checkpoints.save(self._replicas.step, files, meta)

    def _keep_here(self, files: dict[str, bytes], meta: dict[str, Any]) -> None:
        """Keep a checkpoint in the memory of this rank's worker, with what rank 0 alone knows of."""
        gather = self._replicas.collective.all_gather
        own = not self._replicas.rank
        meta = json.loads(gather(json.dumps(meta).encode() if own else b"")[0])
        files["callbacks.npz"] = gather(files["callbacks.npz"] if own else b"")[0]
        self._member.keep(self._replicas.step, Checkpoint(self._replicas.step, files, meta))


class Resumed:
    """A checkpoint that this rank goes on from.

    Parameters
    ----------
    keeping : Keeping
    model : keras.Model
        With all its variables.
    rank : int
    rows : sequence of int
        Of each rank now.
    """

    def __init__(self, keeping: Keeping, model: Any, rank: int, rows: Sequence[int]) -> None:
        self._kept = keeping.checkpoints.load(keeping.step)
        self._rank, self._url = rank, keeping.checkpoints.url
        self._from_first = isinstance(keeping.checkpoints, InWorkers)
        self._model = model
        self._same = list(rows) == self._kept.meta["rows"]
        names = ("epoch", "batch", "stopped", "history", "epochs")
        self.position = Position(**{name: self._kept.meta[name] for name in names})
        self.step: int = self._kept.step

    def restore(self, replicas: Replicas) -> None:
        """Give the model, which now has all its variables, its state.

        Raises
        ------
        DataError
            If the checkpoint is of another model.
        """
        self._check()
        shared = _shared(self._model)
        if SHARED in self._kept.files:
            for variable, value in zip(shared, arrays(self._kept.files[SHARED]), strict=True):
                variable.assign(value.view(variable.dtype) if value.dtype.kind == "V" else value)
        if self._from_first:
            replicas.follow(shared)
        kept = moving(self._model)
        count = len(self._model.metrics_variables)
        states = self._states()
        if self._same:
            values = states[self._rank]
            for variable, value in zip(_own(self._model)[count:], values[count:-1], strict=True):
                variable.assign(value)
            replicas.pend(values[-1])
        elif any(rows := [int(state[-1][0]) for state in states]):
            means = [np.average([s[count + at] for s in states], axis=0, weights=rows) for at in range(len(kept))]
            for variable, value in zip(kept, means):
                variable.assign(value)

    def restore_metrics(self) -> None:
        """Give the metrics what they had seen of the epoch; among other ranks than then, rank 0 has it all."""
        variables = self._model.metrics_variables
        states = self._states()
        if self._same:
            values = states[self._rank][: len(variables)]
        else:
            some = states if self._rank == 0 else []
            values = [np.sum([s[at] for s in some], axis=0) if some else 0 * host(v) for at, v in enumerate(variables)]
        for variable, value in zip(variables, values):
            variable.assign(value)

    def _check(self) -> None:
        kept = self._kept
        shapes = [list(variable.shape) for variable in _shared(self._model)]
        if shapes != kept.meta["variables"]:
            raise DataError(
                f"the checkpoint of step {kept.step} at {self._url} is of another model or optimizer: it has "
                f"{len(kept.meta['variables'])} variables, this one {len(shapes)}, or their shapes differ. Give "
                "another place, or fit the model it is of"
            )

    def _states(self) -> list[list[Any]]:
        return [arrays(self._kept.files[f"rank-{rank}.npz"]) for rank in range(len(self._kept.meta["rows"]))]

    def restore_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Give callbacks their state."""
        tensors = arrays(self._kept.files["callbacks.npz"])
        for callback, state in zip(callbacks, self._kept.meta["callbacks"]):
            for name, value in state.items():
                setattr(callback, name, _with_tensors(value, tensors))


def _shared(model: Any) -> list[Any]:
    """What is the same on all ranks: weights, and the state of the optimizer."""
    return [*(v for v in model.variables if "float" in str(v.dtype)), *model.optimizer.variables]


def _own(model: Any) -> list[Any]:
    """What each rank has for itself: metrics, moving means before they are averaged, and seeds of random numbers."""
    seeds = [v for v in model.variables if "float" not in str(v.dtype)]
    return [*model.metrics_variables, *moving(model), *seeds]


def _states(callbacks: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """What callbacks remember that is numbers, text, arrays or tensors, or a function of `keras.ops`."""
    tensors: list[Any] = []
    states = []
    for callback in callbacks:
        state = {}
        for name, value in vars(callback).items():
            if name not in ("_model", "model", "params") and (plain := _plain(value, tensors)) is not None:
                state[name] = plain
        states.append(state)
    return states, tensors


def _plain(value: Any, tensors: list[Any]) -> Any:
    """A value for JSON, in a list of its own; None for what cannot be kept."""
    import keras

    if keras.ops.is_tensor(value):  # as the best loss is, on TensorFlow
        value = keras.ops.convert_to_numpy(value)
    if (name := getattr(value, "__name__", "")) and value is getattr(keras.ops, name, None):
        return {"op": name}  # how values are compared: set once, together with the sign of what is compared
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, np.generic):
        return {"value": value.item()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        tensors.append(value)
        return {"array": len(tensors) - 1}
    if isinstance(value, list) and value and all(isinstance(v, np.ndarray) and not v.dtype.hasobject for v in value):
        tensors.extend(value)
        return {"arrays": list(range(len(tensors) - len(value), len(tensors)))}
    return None


def _with_tensors(plain: Mapping[str, Any], tensors: Sequence[Any]) -> Any:
    import keras

    if "array" in plain:
        return tensors[plain["array"]]
    if "op" in plain:
        return getattr(keras.ops, plain["op"])
    return [tensors[at] for at in plain["arrays"]] if "arrays" in plain else plain["value"]
