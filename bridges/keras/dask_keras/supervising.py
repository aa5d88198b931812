"""The client's side of a training: partitions and ranks are placed, anew where one is lost; the result is adopted."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import pickle
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future
from distributed.protocol.pickle import dumps

from dask_bridges import partitions, placement
from dask_bridges.about import About
from dask_bridges.collective import is_collective_error
from dask_bridges.errors import DataError, MemberLost, PlacementError
from dask_bridges.events import Event, Log, Metrics
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.partitions import Partitions, Prepared
from dask_bridges.processes import Environment
from dask_keras import checks, upstream
from dask_keras.hosting import Rank, host_rank
from dask_keras.layout import Layout, flatten, nested
from dask_keras.places import LABEL, Places
from dask_keras.replica import Fit, Set, Trained
from dask_keras.resuming import InWorkers, Keeping
from dask_tf import encoding
from dask_tf.events import Spooled
from dask_tf.starting import keras_backend, variables

__all__ = ["EpochPrinter", "Given", "Supervised"]

logger = logging.getLogger(__name__)

#: A training is given up when so many attempts have brought no new checkpoint.
ATTEMPTS = 3


@dataclass(frozen=True)
class Given:
    """The collections of one set, by role, and what the model takes of them."""

    name: str
    collections: dict[str, Any]
    layout: Layout

    @classmethod
    def of(cls, name: str, model: Any, prefix: str, X: Any, y: Any = None, weight: Any = None) -> Given:
        """What a caller has given; `prefix` is what messages put before "X"."""
        if weight is not None and y is None:
            raise DataError(f"{prefix}sample_weight goes with targets, and there is no {prefix}y")
        given = {"x": (f"{prefix}X", X), "y": (f"{prefix}y", y), "weight": (f"{prefix}sample_weight", weight)}
        given = {part: named for part, named in given.items() if part == "x" or named[1] is not None}
        collections = {part: flatten(*named) for part, named in given.items()}
        matrices = checks.matrices(model, X, collections["x"])
        if y is not None:
            matrices |= checks.target_matrices(model, y, collections["y"])
        roles = {part: nested(*named) for part, named in given.items()}
        layout = Layout(**roles, matrices=matrices, inputs=checks.input_keys(model))
        return cls(name, {role: each for some in collections.values() for role, each in some.items()}, layout)


@dataclass
class Supervised:
    """One call of `fit`.

    Attributes
    ----------
    client : Client
    model : keras.Model
    callbacks : sequence of Callback
    sets : sequence of Given
        To train on and, if there is a second one, to validate with.
    places : Places
    options : dict
        For `GangPlan`.
    fit : dict
        Fields of `Fit` that are known before the data.
    keeping : Keeping or None
    listeners : sequence of callable
        Hear the events of every attempt.
    reproducible : bool
        Whether another call is to give the same result.
    """

    client: Client
    model: Any
    callbacks: Sequence[Any]
    sets: Sequence[Given]
    places: Places
    options: dict[str, Any]
    fit: dict[str, Any]
    keeping: Keeping | None
    listeners: Sequence[Any]
    reproducible: bool
    prepared: Sequence[Prepared] = ()
    _id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _gang: Gang | None = None  # of the last attempt, whose ranks may have kept its state

    def prepare(self) -> None:
        """Align the collections, in the caller's thread."""
        self.prepared = partitions.prepare_all(self.client, [given.collections for given in self.sets])

    async def run(self) -> Any:
        """Train, and give the history."""
        try:
            return _adopted(self.model, self.callbacks, await self._attempts())
        finally:
            for listener in self.listeners:
                getattr(listener, "close", int)()

    async def _attempts(self) -> Trained:
        if self.keeping is not None:
            await asyncio.to_thread(self.keeping.checkpoints.check)
        last, failures, attempt = -2, 0, 1  # nothing was tried yet
        lost: MemberLost | None = None
        while True:
            newest = await self._newest()
            failures = 0 if newest > last else failures + 1
            last = newest
            try:
                return await self._attempt(attempt, None if newest < 0 else newest)
            except PlacementError as missing:
                if lost is None:
                    raise
                raise missing from lost
            except MemberLost as error:
                if self.keeping is None or failures + 1 >= ATTEMPTS or self.client.status != "running":
                    raise
                await self._collect()
                kept = await self._newest() >= 0
                goes_on = "goes on from the last checkpoint" if kept else "begins anew: there is no checkpoint"
                logger.warning("%s It %s.", error, goes_on)
                lost, attempt = error, attempt + 1
            finally:
                await self._collect(wanted=False)

    async def _collect(self, *, wanted: bool = True) -> None:
        """Have what the ranks of the last attempt have kept in their workers, which they forget."""
        gang, self._gang = self._gang, None
        keeping = self.keeping
        if gang is None or keeping is None or not isinstance(keeping.checkpoints, InWorkers):
            return
        if self.client.status == "running":
            await keeping.checkpoints.collect(self.client, gang.id, gang.plan.workers, wanted=wanted)

    async def _newest(self) -> int:
        """Step of the newest checkpoint; -1 where there is none."""
        if self.keeping is None:
            return -1
        newest = await asyncio.to_thread(self.keeping.checkpoints.latest)
        return -1 if newest is None else newest

    async def _attempt(self, attempt: int, step: int | None) -> Trained:
        parts = await self._placed(step)
        ranks = parts[0].holding()
        work, keys = self._work(parts, ranks, step)
        held = [dict(enumerate(some.futures)) for some in parts]
        for some in parts:
            some.futures.clear()
        environment = _environment()
        plan = GangPlan(
            LABEL,
            host_rank,
            [
                Rank(
                    work.of_rank(rank),
                    {name: by_rank[rank] for name, by_rank in keys.items()},
                    environment,
                    self.places.devices_of(worker),
                )
                for rank, worker in enumerate(ranks)
            ],
            ranks,
            collateral=is_collective_error,
            about=self._about(parts, ranks),
            **self.options,
        )
        self._gang = gang = Gang(self.client, plan, attempt)
        for listener in (_Release(self.sets, held), _tell, *self.listeners):
            gang.events.listen(listener)
        try:
            trained: Trained = (await gang.run())[0]
            return trained
        finally:
            for futures in held:
                futures.clear()

    def _about(self, parts: Sequence[Partitions], ranks: Sequence[str]) -> About:
        """What a report tells of it."""
        params = {name: value for name, value in self.fit.items() if name not in ("callbacks", "home", "port")}
        params |= {"model": f"{type(self.model).__name__} {self.model.name}", "backend": keras_backend()}
        packages = list(dict.fromkeys(("keras", keras_backend())))
        sets = {given.name: some.lying(ranks) for given, some in zip(self.sets, parts)}
        return About(self._id, params, packages, sets)

    async def _placed(self, step: int | None) -> list[Partitions]:
        """The partitions of all sets, on the workers that are to train."""
        client, wanted = self.client, self.places.workers
        first = not self.places.names
        places = await self.places.find()
        training, *others = await partitions.load_all(
            client,
            [(prepared, encoding.look) for prepared in self.prepared],
            workers=places if self.places.named else None,
        )
        rows = sum(training.rows)
        if not rows:
            raise DataError("X has no rows")
        if isinstance(wanted, int) and rows < wanted:
            raise DataError(f"X has {rows} rows, which are fewer than the {wanted} workers asked for")
        places = await self.places.still_there(places, any_will_do=first and wanted is None)
        await placement.check_packages(client, places, ["dask_bridges"])
        await placement.check_packages(
            client, places, [keras_backend(), "keras"], ': pip install "dask-bridges[keras]"', imports=False
        )
        training.split(client, len(places))
        as_before = await self._as_before(step)
        if len(as_before) == len(places) and sum(map(len, as_before)) == len(training.filled()):
            where = {number: place for numbers, place in zip(as_before, places) for number in numbers}
            await training.place(client, [where.get(number, places[0]) for number in range(len(training.rows))])
        elif self.reproducible:
            await training.divide(client, places)
        else:
            await training.spread(client, places, everywhere=True)
        for other in others:
            await other.spread(client, training.holding())
        return [training, *others]

    async def _as_before(self, step: int | None) -> list[list[int]]:
        """The numbers of the partitions of each rank, as a checkpoint has them."""
        if self.keeping is None or step is None:
            return []
        kept = await asyncio.to_thread(self.keeping.checkpoints.load, step)
        return [list(numbers) for numbers in kept.meta["parts"]]

    def _work(
        self, parts: Sequence[Partitions], ranks: Sequence[str], step: int | None
    ) -> tuple[Fit, dict[str, list[dict[int, Any]]]]:
        """What all ranks are told, and the keys of each rank's partitions."""
        sets: list[Set] = []
        keys: dict[str, list[dict[int, Any]]] = {}
        for given, found in zip(self.sets, parts):
            schema = encoding.merge([info.extra for info in found.infos], tuple(given.collections))
            rows = tuple(found.rows_on(worker) for worker in ranks)
            sets.append(Set(given.name, schema, given.layout, rows))
            keys[given.name] = [
                {number: found.futures[number].key for number in found.filled() if found.workers[number] == worker}
                for worker in ranks
            ]
        checks.check_element(self.model, sets[0])
        options = dict(self.fit)
        options["steps_per_epoch"] = options["steps_per_epoch"] or -(-sum(sets[0].rows) // options["batch_size"])
        keeping = self.keeping
        if keeping is not None:
            numbers = tuple(tuple(its) for its in keys[self.sets[0].name])
            keeping = dataclasses.replace(keeping, step=step, parts=numbers)
        model = bytes(dumps(self.model))
        validation = sets[1] if len(sets) > 1 else None
        return Fit(model=model, training=sets[0], validation=validation, keeping=keeping, **options), keys


class _Release:
    """Lets go of Dask's copy of a partition once it is written."""

    def __init__(self, sets: Sequence[Given], held: Sequence[dict[int, Future]]) -> None:
        self._held = {given.name: some for given, some in zip(sets, held)}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Spooled) and (future := self._held[event.ticket].pop(event.part, None)):
            future.release()


def _tell(event: Event) -> None:
    """Log what a rank has to say."""
    if isinstance(event, Log) and event.rank >= 0 and not event.stream:
        logger.log(event.level, "[gang %s] %s, rank %d: %s", event.gang, LABEL, event.rank, event.text)


class EpochPrinter:
    """Prints a line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def __call__(self, event: Event) -> None:
        """Hear of one."""
        if isinstance(event, Metrics):
            values = " - ".join(f"{name}: {value:.4f}" for name, value in event.values.items())
            print(f"Epoch {event.step + 1}/{self._epochs} - {values}")


def _environment() -> Environment:
    return Environment((keras_backend(), "keras"), tuple(sorted(variables().items(), key=lambda item: item[0])))


def _adopted(model: Any, callbacks: Sequence[Any], trained: Trained) -> Any:
    """The model and the callbacks as `model.fit` would leave them, and the history."""
    import keras

    copy = pickle.loads(trained.model)
    if not model.built:
        model.build_from_config(copy.get_build_config())
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    for ours, theirs in (
        (model.variables, copy.variables),
        (model.optimizer.variables, copy.optimizer.variables),
    ):
        for own, its in zip(ours, theirs, strict=True):
            own.assign(its)
    for callback, state in zip(callbacks, trained.callbacks, strict=True):
        vars(callback).update({name: pickle.loads(value) for name, value in state.items()})
        upstream.attach(callback, model)
    history = next((each for each in callbacks if isinstance(each, keras.callbacks.History)), None)
    history = history or keras.callbacks.History()
    history.set_model(model)
    history.set_params(trained.history["params"])
    history.history, history.epoch = trained.history["history"], trained.history["epoch"]
    model.history, model.stop_training = history, trained.stopped
    return history
