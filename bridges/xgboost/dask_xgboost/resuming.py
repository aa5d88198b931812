"""What a training goes on from after a loss: its state at a round, kept by every rank or in a store."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
from distributed import Client, Worker

from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError
from dask_bridges.task import WorkerMember

__all__ = ["Keeper", "Keeping", "State", "at", "collect", "left_behind", "load", "plain", "restore"]

logger = logging.getLogger(__name__)

#: Seconds for which a member that has ended leaves its state to the client, and for which the client asks.
LEFT_FOR = 60.0
ANSWER_WITHIN = 10.0

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


# On the workers

_kept: dict[tuple[str, str], tuple[int, State]] = {}  # by worker and gang, with the rank


def _key(member: WorkerMember) -> tuple[str, str]:
    return member.worker.address, member.gang


@contextlib.contextmanager
def left_behind(member: WorkerMember) -> Iterator[None]:
    """While a rank trains: what it keeps is there for the client when it has ended, and not for ever."""
    try:
        yield
    finally:
        if (key := _key(member)) in _kept:
            loop = member.worker.loop
            loop.add_callback(loop.call_later, LEFT_FOR, _kept.pop, key, None)


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

    def __init__(self, member: WorkerMember, keeping: Keeping, callbacks: Sequence[Any], cuts: Cuts) -> None:
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
            _kept[_key(self._member)] = (self._member.rank, state)
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


# On the client


async def collect(client: Client, gang: str, workers: Sequence[str], *, wanted: bool = True) -> State | None:
    """The newest state that the ranks of a gang have kept; they forget it.

    Parameters
    ----------
    client : Client
    gang : str
        Its id.
    workers : sequence of str
        Addresses of its workers; those that are gone are not asked.
    wanted : bool
        Whether they are only to forget.
    """
    there = (await client.scheduler.identity(n_workers=-1))["workers"]
    left = [worker for worker in dict.fromkeys(workers) if worker in there]
    if not left:
        return None
    newest: list[State] = []
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            if wanted:
                found = await client.run(_look, gang, workers=left, on_error="ignore")
                # The same of all ranks, but for callbacks: rank 0's where it is left.
                kept = sorted((-done, rank, worker) for worker, (rank, done) in found.items() if done)
                for _, _, worker in kept[:1]:
                    newest += (await client.run(_take, gang, workers=[worker])).values()
            await client.run(_forget, gang, workers=left, on_error="ignore")
    except (OSError, TimeoutError) as error:
        logger.warning("[gang %s] what the ranks have kept cannot be had: %r", gang, error)
    return newest[0] if newest else None


def _look(gang: str, dask_worker: Worker) -> tuple[int, int]:
    """Rank and round; 0 where nothing is kept."""
    kept = _kept.get((dask_worker.address, gang))
    return (kept[0], kept[1].round) if kept else (0, 0)


def _take(gang: str, dask_worker: Worker) -> State | None:
    kept = _kept.pop((dask_worker.address, gang), None)
    return kept[1] if kept else None


def _forget(gang: str, dask_worker: Worker) -> None:
    _kept.pop((dask_worker.address, gang), None)
