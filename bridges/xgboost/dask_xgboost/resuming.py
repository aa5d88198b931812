"""What a training goes on from after a loss: its state at a round, kept by every rank or in a store."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError
from dask_bridges.member import Member

__all__ = ["Keeper", "Keeping", "State", "at", "load", "plain", "restore"]

Cuts = tuple[Any, Any]
Placement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class State:
    """A training between two rounds.

    Attributes
    ----------
    round : int
        Rounds that are over.
    model : bytes
        The booster.
    config : str
        Its parameters as they are now, and what objectives know beside the model.
    history : dict
        ``{name: {metric: [value, ...]}}``.
    callbacks : tuple of dict
        What each callback remembers: pickled, or as plain data from a store.
    cuts : tuple of ndarray
        Of the training matrix, see `xgboost.DMatrix.get_quantile_cut`.
    placement : tuple of tuple of int
        The rank of each partition, by matrix.
    """

    round: int
    model: bytes
    config: str
    history: dict[str, dict[str, list[float]]]
    callbacks: tuple[dict[str, Any], ...]
    cuts: Cuts
    placement: Placement


@dataclass(frozen=True)
class Keeping:
    """Where the state is kept.

    Attributes
    ----------
    checkpoints : Checkpoints or None
        Where rank 0 writes; without, every rank keeps its own in its worker's memory.
    training : dict
        What the training is, as plain data: a checkpoint of another is refused.
    placement : tuple of tuple of int
        See `State`.
    """

    checkpoints: Checkpoints | None
    training: dict[str, Any] = field(default_factory=dict)
    placement: Placement = ()


def at(checkpoint: str | Path | Checkpoints) -> Checkpoints:
    """The checkpoints of `train`'s argument.

    Raises
    ------
    DataError
        If they would be in the memory of one process.
    """
    checkpoints = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    if checkpoints.url.startswith("memory:"):
        raise DataError(
            f"checkpoint={checkpoints.url!r} is the memory of one process, which may be the one that is lost: give a "
            "folder that all hosts share, or a bucket. Without checkpoint=, every worker keeps the state in its memory"
        )
    return checkpoints


class Keeper:
    """Keeps the state of a rank while it trains.

    Parameters
    ----------
    member : Member
    keeping : Keeping
    callbacks : sequence of TrainingCallback
        Whose state is kept.
    cuts : tuple of ndarray
        Of the training matrix.
    """

    def __init__(self, member: Member, keeping: Keeping, callbacks: Sequence[Any], cuts: Cuts) -> None:
        self._member, self._keeping, self._callbacks, self._cuts = member, keeping, callbacks, cuts

    def keep(self, booster: Any, history: Any, done: int) -> None:
        """Keep the state after so many rounds."""
        with self._member.tally.timed("checkpoint"):
            self._keep(booster, history, done)

    def _keep(self, booster: Any, history: Any, done: int) -> None:
        checkpoints = self._keeping.checkpoints
        if checkpoints is not None and self._member.rank:
            return
        remembered = _remembered if checkpoints is None else _remembered_plainly
        state = State(
            done,
            bytes(booster.save_raw("ubj")),
            booster.save_config(),
            plain(history),
            tuple(remembered(callback) for callback in self._callbacks),
            self._cuts,
            self._keeping.placement,
        )
        if checkpoints is None:
            self._member.keep(state.round, state)
        else:
            _save(checkpoints, state, self._keeping.training)


def plain(history: Any) -> dict[str, dict[str, list[float]]]:
    """XGBoost's history as plain data, of its own."""
    return {name: {m: [float(v) for v in values] for m, values in log.items()} for name, log in history.items()}


def restore(callbacks: Sequence[Any], state: State) -> None:
    """Give callbacks what they remembered; what else they hold is as `before_training` has left it."""
    for callback, remembered in zip(callbacks, state.callbacks):
        for name, value in remembered.items():
            setattr(callback, name, pickle.loads(value) if isinstance(value, bytes) else value)


def _remembered(callback: Any) -> dict[str, bytes]:
    found = {}
    for name, value in vars(callback).items():
        with contextlib.suppress(Exception):  # a file, a lock
            found[name] = cloudpickle.dumps(value)
    return found


def _remembered_plainly(callback: Any) -> dict[str, Any]:
    """What JSON gives back as it was."""
    found = {}
    for name, value in vars(callback).items():
        with contextlib.suppress(TypeError, ValueError):
            value = value.item() if isinstance(value, np.generic) else value
            copy = json.loads(json.dumps(value))
            if copy == value:
                found[name] = copy
    return found


# In a store


def _save(checkpoints: Checkpoints, state: State, training: dict[str, Any]) -> None:
    files = {
        "model.ubj": state.model,
        "config.json": state.config.encode(),
        "pointers.npy": _array(state.cuts[0]),
        "cuts.npy": _array(state.cuts[1]),
    }
    meta = {
        "history": state.history,
        "callbacks": list(state.callbacks),
        "placement": [list(ranks) for ranks in state.placement],
        "training": training,
    }
    checkpoints.save(state.round, files, meta)


def load(checkpoints: Checkpoints, training: dict[str, Any], rounds: int) -> State | None:
    """The newest state in a store; None where there is none.

    Raises
    ------
    DataError
        If it is of another training, or of a longer one.
    """
    newest = checkpoints.latest()
    if newest is None:
        return None
    kept = checkpoints.load(newest)
    meta = kept.meta
    if other := [name for name, value in training.items() if meta["training"].get(name) != value]:
        raise DataError(
            f"the checkpoint of round {newest} at {checkpoints.url} is of another training, with other "
            f"{', '.join(other)}: give another place, or remove what is there"
        )
    if newest >= rounds:
        raise DataError(
            f"the checkpoint at {checkpoints.url} is of round {newest}, and num_boost_round is {rounds}: give another "
            "place, or remove what is there"
        )
    return State(
        newest,
        kept.files["model.ubj"],
        kept.files["config.json"].decode(),
        meta["history"],
        tuple(meta["callbacks"]),
        (np.load(io.BytesIO(kept.files["pointers.npy"])), np.load(io.BytesIO(kept.files["cuts.npy"]))),
        tuple(tuple(ranks) for ranks in meta["placement"]),
    )


def _array(values: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()
