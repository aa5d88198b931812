"""The client's side of a training: data and ranks are placed, anew after a loss; the result is adopted."""

from __future__ import annotations

import asyncio
import logging
import pickle
import uuid
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

from dask.base import tokenize
from dask.utils import format_bytes
from distributed import Client

from dask_bridges import config, placement, safekeeping
from dask_bridges.about import About
from dask_bridges.devices.members import Wanted
from dask_bridges.errors import BridgeError, DataError, MemberLost, PlacementError, WorkerLeft
from dask_bridges.events import Event, FinishAsked, Progress
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.placement import WorkerInfo
from dask_xgboost import checks, dmatrix, resuming
from dask_xgboost.communicator import is_collective_error
from dask_xgboost.devices import on_gpus, wants_gpus
from dask_xgboost.dmatrix import PACKAGES, DMatrix
from dask_xgboost.hosting import train_here, train_in_child
from dask_xgboost.places import Places
from dask_xgboost.rank import Loop, TrainResult, TrainSpec
from dask_xgboost.ready import Agreed, MatricesSpec
from dask_xgboost.resident import disown
from dask_xgboost.resuming import Keeping, State

__all__ = ["Supervised"]

logger = logging.getLogger(__name__)

LABEL = "XGBoost training"

#: A training is given up when so many attempts, one after the other, have come no further than those before.
BARREN = 2

MAX_BIN = 256  # XGBoost's default

#: From so many rows on, finding quantiles takes less time than XGBoost's sketch.
_MANY_ROWS = 100_000

#: So often partitions are brought back that were not there when a training began.
FETCHES = 3

#: Objectives whose leaves XGBoost fits rank by rank and then averages.
_ADAPTIVE = ("reg:absoluteerror", "reg:quantileerror")


@dataclass
class Supervised:
    """One call of `train`.

    Attributes
    ----------
    client : Client
    loop : Loop
    matrix : DMatrix
    evals : list of (DMatrix, str)
    places : Places
    exclusive : bool
        See `GangPlan`.
    keeping : Keeping or None
        None where nothing is kept.
    max_restarts : int
    listeners : sequence of callable
        Hear the events of every attempt.
    folds : Asked or None
        Of a cross-validation.
    """

    client: Client
    loop: Loop
    matrix: DMatrix
    evals: list[tuple[DMatrix, str]]
    places: Places
    exclusive: bool
    keeping: Keeping | None
    max_restarts: int
    listeners: Sequence[Any] = ()
    folds: Any = None
    _names: list[str] = field(default_factory=list)  # of the workers, by rank
    _ranks: list[str] = field(default_factory=list)  # their addresses
    _placement: resuming.Placement = ()
    _gang: Gang | None = None
    _id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _finishing: bool = False  # whether somebody has asked it to stop
    _devices: Mapping[str, Wanted] = field(default_factory=dict)  # by the workers' addresses, where GPUs train
    _owned: bool = True  # whether ranks train in their workers' processes

    def __post_init__(self) -> None:
        self._gpus = wants_gpus(self.loop.params)
        external = [matrix.role for matrix in self.matrices if matrix.options.external_memory]
        if external and self._gpus:
            raise DataError(
                f"{external[0]} is in external memory, which is the worker's disk, and device='cuda' trains on what is "
                "in the GPU's memory: leave external_memory or device out"
            )
        self._max_bin = int(self.loop.params.get("max_bin", MAX_BIN))
        self._tokens: list[str] = []  # of what an attempt leaves on the workers, by matrix

    @property
    def matrices(self) -> list[DMatrix]:
        """The training matrix, and those of the evaluation sets, each once."""
        return list({id(matrix): matrix for matrix in (self.matrix, *(matrix for matrix, _ in self.evals))}.values())

    def prepare(self) -> None:
        """Align the collections, in the caller's thread."""
        dmatrix.prepare(self.client, self.matrices)

    async def run(self, evals_result: dict[str, Any] | None) -> Any:
        """Train, and bring back rank 0's result: the booster, or the histories of a cross-validation."""
        try:
            return self._deliver(await self._attempts(), evals_result)
        finally:
            for matrix in self.matrices:
                if matrix.release and matrix._loaded is not None:
                    matrix.parts.release()
            for listener in self.listeners:
                getattr(listener, "close", int)()

    # Attempts

    async def _attempts(self) -> TrainResult:
        state: State | None = None
        furthest, barren, restarts = -1, 0, 0
        earlier: BridgeError | None = None
        if self.keeping is not None and self.keeping.checkpoints is not None:
            await asyncio.to_thread(self.keeping.checkpoints.check)
        while True:
            reached = _Reached()
            try:
                await self._place()
                state = await self._stored() or state
                if state is not None:
                    await self._place_as(state.placement)
                result = await self._attempt(restarts + 1, state, reached)
                for _ in range(FETCHES):
                    if not result.agreed.lacking:
                        break
                    await self._fetch(result.agreed.lacking)
                    result = await self._attempt(restarts + 1, state, reached)
                if lacking := result.agreed.lacking:
                    raise PlacementError(
                        f"partitions were taken from {sorted({self._ranks[rank] for rank, _ in lacking})} before they "
                        "could be binned, again and again: is the cluster being rebalanced?"
                    )
            except (MemberLost, WorkerLeft) as lost:
                if not self.max_restarts or self._is_taken_away():
                    raise
                state = await self._kept() or state
                self._finishing |= reached.finishing
                come = max(reached.rounds, state.round if state is not None else 0)
                if isinstance(lost, MemberLost):  # and not while the data were placed, which tells of no bug
                    barren = 0 if come > furthest else barren + 1
                furthest = max(come, furthest)
                if barren >= BARREN:
                    lost.add_note(
                        f"The last {BARREN} attempts, of {restarts + 1}, came no further than round {furthest}."
                    )
                    raise
                if restarts >= self.max_restarts:
                    lost.add_note(f"It was started again as often as max_restarts={self.max_restarts} allows.")
                    raise
                self._adopt(None)
                restarts, earlier = restarts + 1, lost
                logger.warning("%s It goes on from what was kept; round %d had been reached.", lost, come)
            except BridgeError as error:
                await self._kept(wanted=False)
                await disown(self.client, self._ranks, self._tokens)
                error.__cause__ = error.__cause__ or earlier
                raise
            else:
                self._adopt(result.agreed)
                if self.loop.num_boost_round > self.loop.segment:
                    await self._kept(wanted=False)
                return result

    def _is_taken_away(self) -> bool:
        """Whether there is nothing to go on with: the scheduler is gone, or the data are, as by `Client.restart`."""
        placed = [matrix.parts for matrix in self.matrices if matrix._loaded is not None]
        held = [parts.futures for parts in placed if not parts.released]
        return self.client.status != "running" or any(f.status == "cancelled" for futures in held for f in futures)

    async def _attempt(self, number: int, state: State | None, reached: _Reached) -> TrainResult:
        if self.folds is not None:
            await self.folds.settle(self.client, self.matrix)
        for matrix in self.matrices:
            await matrix.residents.taken()
        plan = GangPlan(
            label=LABEL,
            function=train_here if self._owned else train_in_child,
            payloads=self._specs(state),
            workers=self._ranks,
            collateral=is_collective_error,
            timeout=self.places.timeout,
            exclusive=self.exclusive,
            finishes=True,
            about=self._about(),
        )
        self._gang = gang = Gang(self.client, plan, number)
        for listener in (reached, *self.listeners):
            gang.events.listen(listener)
        result: TrainResult | bytes = (await gang.run())[0]
        return pickle.loads(result) if isinstance(result, bytes) else result

    async def _stored(self) -> State | None:
        """What the store has; nothing without one."""
        keeping = self.keeping
        if keeping is None or keeping.checkpoints is None:
            return None
        return await asyncio.to_thread(resuming.load, keeping.checkpoints, self._described(), self.loop.num_boost_round)

    async def _kept(self, *, wanted: bool = True) -> State | None:
        """What the ranks that are left have kept of the last attempt, which they forget."""
        gang, self._gang = self._gang, None
        if gang is None or self.keeping is None or self.keeping.checkpoints is not None or not self.max_restarts:
            return None
        state: State | None = await safekeeping.collect(self.client, gang.id, self._ranks, wanted=wanted)
        return state

    # Places

    async def _place(self) -> None:
        """See that the workers are there, by rank, with all data; after a loss where they were, as far as can be."""
        if not self._names:
            await self._place_first()
            return
        named = self.places.chosen
        back = await self._with_gpus(await placement.workers_back(self.client, self._names, others=not named))
        places = [worker.address for worker in back]
        matrices = self.matrices
        await dmatrix.replace(self.client, matrices, places if named else None)
        await placement.check_packages(self.client, places, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
        if len(places) == len(self._names):
            await self._move(places, self._placement)
        else:
            await self._spread(places)
        self._settle(back)

    async def _place_first(self) -> None:
        matrices = self.matrices
        usable = await self._usable()
        number = self.places.n_workers
        again = [worker for worker in usable if number is None or worker.address in self.matrix.among]
        if number in (None, len(again)) and await self._all_resident([worker.address for worker in again]):
            self._settle(again)
            self._check()
            return
        addresses = [worker.address for worker in usable]
        placed = [matrix for matrix in matrices if matrix._loaded is not None]
        await dmatrix.replace(self.client, placed, addresses if self.places.chosen else None)
        await dmatrix.place(self.client, matrices, addresses if self._gpus or self.places.chosen else None)
        usable = await self.places.fullest(self.client, await self._usable(), self.matrix.parts)
        await self._spread([worker.address for worker in usable])
        self._settle(usable)
        self._check()
        self._warn([worker for worker in usable if worker.address in self._ranks])

    def _check(self) -> None:
        """Refuse what the objective does not take, and what several ranks cannot do."""
        for params in [self.loop.params] if self.folds is None else self.folds.params:
            for matrix in self.matrices:
                if self.loop.obj is None:
                    checks.check_labels(matrix.role, params, matrix.infos)
            checks.check_ranks(params, len(self._ranks))

    async def _usable(self) -> list[WorkerInfo]:
        """The workers that can train now."""
        return await self._with_gpus(await self.places.usable(self.client))

    async def _with_gpus(self, workers: list[WorkerInfo]) -> list[WorkerInfo]:
        """Those that have a GPU, where GPUs train; once children have trained, they do so after a loss, too."""
        if not self._gpus:
            return workers
        addresses = [worker.address for worker in workers]
        await placement.check_packages(self.client, addresses, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
        named, timeout = self.places.workers is not None, self.places.timeout
        there = await on_gpus(self.client, workers, LABEL, named=named, owned=self._owned, timeout=timeout)
        self._devices, self._owned = there.wanted, there.owned
        return there.workers

    async def _spread(self, places: Sequence[str]) -> None:
        matrices = self.matrices
        await self.matrix.parts.spread(self.client, places)
        self.matrix.among = frozenset(places)
        ranks = self.matrix.parts.holding()
        await placement.check_packages(self.client, ranks, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
        for matrix in matrices[1:]:
            await matrix.place_like(ranks, everywhere=bool(self._categories()))

    async def _place_as(self, before: resuming.Placement) -> None:
        """Give every rank the partitions that it had when a state was kept, where there are as many."""
        now = self._placement
        if now == before or max(before[0]) != max(now[0]) or [*map(len, before)] != [*map(len, now)]:
            return
        await self._move(self._ranks, before)
        self._placement = before

    async def _move(self, places: Sequence[str], by_rank: resuming.Placement) -> None:
        for matrix, ranks in zip(self.matrices, by_rank):
            await matrix.parts.place(self.client, [places[rank] for rank in ranks])

    def _settle(self, workers: Sequence[WorkerInfo]) -> None:
        """Take down who is which rank, and what each one has."""
        self._ranks = self.matrix.parts.holding()
        by_address = {worker.address: worker.name for worker in workers}
        self._names = [by_address[address] for address in self._ranks]
        numbers = {address: rank for rank, address in enumerate(self._ranks)}
        self._placement = tuple(
            tuple(numbers.get(address, 0) for address in matrix.parts.workers) for matrix in self.matrices
        )

    # What stays on the workers

    async def _all_resident(self, usable: Sequence[str]) -> bool:
        """Whether the ranks of before have all matrices, so that no partition is needed."""
        matrices = self.matrices
        if self._gpus or any(matrix._loaded is None for matrix in matrices) or self.matrix.among != frozenset(usable):
            return False
        ranks = self.matrix.parts.holding()
        return all(
            set(matrix.parts.holding()) <= set(ranks)
            and all(matrix.residents.key(worker, self._how(matrix, worker)) for worker in ranks)
            for matrix in matrices
        )

    def _how(self, matrix: DMatrix, worker: str) -> str:
        """Tells what a worker's part of a matrix is built from, and how, from anything else."""
        return f"{self._binning()} {matrix.parts.rows_by_part(worker)}"

    def _binning(self) -> str:
        how: str = tokenize(self._max_bin, self._by_quantiles(), self._categories())
        return how

    async def _fetch(self, lacking: Sequence[tuple[int, int]]) -> None:
        """Bring back the partitions of matrices that are neither built nor can be: memory was short."""
        for rank, number in lacking:
            self.matrices[number].residents.forget(self._ranks[rank])
        await self._place()

    def _adopt(self, agreed: Agreed | None) -> None:
        """Have the workers keep what an attempt has built; None where it is not known what that was."""
        for number, (matrix, token) in enumerate(zip(self.matrices, self._tokens)):
            for rank, worker in enumerate(self._ranks):
                how = self._how(matrix, worker)
                had = matrix.residents.key(worker, how) is not None if agreed is None else agreed.had[rank, number]
                if not had:
                    matrix.residents.adopt(self.client, worker, how, token)
        self._tokens = []

    # What ranks are told, and what they tell

    def _categories(self) -> dict[str, Any]:
        """Categories over the training and the evaluation sets, so that all are coded alike."""
        union = self.matrix.categories()
        for matrix, _ in self.evals:
            if matrix is not self.matrix:
                union = {
                    name: known if name not in (other := matrix.categories()) or other[name].isin(known).all()
                    else known.append(other[name].difference(known))
                    for name, known in union.items()
                }  # fmt: skip
        return union

    def _by_quantiles(self) -> bool:
        """Whether the columns are cut at their quantiles, and not where XGBoost's sketch says."""
        if self.loop.cuts == "auto":
            return not self._gpus and self.matrix.rows >= _MANY_ROWS
        return self.loop.cuts == "quantiles"

    def _described(self) -> dict[str, Any]:
        """What tells this training from others, for JSON."""
        model = self.loop.xgb_model
        return {
            "params": {name: str(value) for name, value in sorted(self.loop.params.items())},
            "features": self.matrix.num_features,
            "rows": [matrix.rows for matrix in self.matrices],
            "evals": [name for _, name in self.evals],
            "checkpoint_every": self.loop.segment,
            "xgb_model": None if model is None else zlib.crc32(model),
        }

    def _about(self) -> About:
        """What a report tells of it."""
        matrices = {"train": self.matrix, **{name: matrix for matrix, name in self.evals if matrix is not self.matrix}}
        sets = {name: matrix.parts.lying(self._ranks) for name, matrix in matrices.items()}
        loop = self.loop
        rounds = {"num_boost_round": loop.num_boost_round, "early_stopping_rounds": loop.early_stopping_rounds}
        return About(self._id, {**loop.params, **rounds, "checkpoint_every": loop.segment}, ("xgboost",), sets)

    def _specs(self, state: State | None) -> list[TrainSpec]:
        keeping = self.keeping
        if keeping is not None:
            keeping = replace(keeping, training=self._described(), placement=self._placement)
        numbers = {id(matrix): number for number, matrix in enumerate(self.matrices)}
        evals = tuple((numbers[id(matrix)], name) for matrix, name in self.evals)
        return [
            TrainSpec(
                self.loop,
                matrices,
                evals,
                keeping=keeping,
                state=state,
                devices=self._devices.get(worker),
                finishing=self._finishing,
                folds=None if self.folds is None else self.folds.on(self.matrix, worker),
            )
            for worker, matrices in zip(self._ranks, self._matrices_specs(state))
        ]

    def _matrices_specs(self, state: State | None) -> list[MatricesSpec]:
        matrices, categories = self.matrices, self._categories()
        # With rows elsewhere the cuts are the state's, and those of no other training.
        cuts = state.cuts if state is not None and state.placement[0] != self._placement[0] else None
        keep = config.get("xgboost.resident") and cuts is None and not self._gpus
        self._tokens = [uuid.uuid4().hex for _ in matrices] if keep else []
        for matrix in matrices:
            matrix.residents.keep_only({w: self._how(matrix, w) for w in self._ranks} if keep else {})
        held: dict[str, list[str | None]] = {
            worker: [matrix.residents.key(worker, self._how(matrix, worker)) for matrix in matrices]
            for worker in self._ranks
        }
        return [
            MatricesSpec(
                each=tuple(
                    matrix.spec(worker, categories, key, token)
                    for matrix, key, token in zip(matrices, held[worker], self._tokens or repeat(None))
                ),
                max_bin=self._max_bin,
                quantiles=self._by_quantiles(),
                cuts=cuts,
                resident=any(key for keys in held.values() for key in keys),
            )
            for worker in self._ranks
        ]

    def _warn(self, workers: Sequence[WorkerInfo]) -> None:
        ranks = self._ranks
        objective = str(self.loop.params.get("objective", ""))
        if objective in _ADAPTIVE and len(ranks) > 1:
            warnings.warn(
                f"{objective} on {len(ranks)} workers: XGBoost fits leaf values on each worker's rows and averages "
                "them, so the model depends on how rows are spread. Shuffle the rows, or train on one worker "
                "(workers=[...]).",
                UserWarning,
                stacklevel=2,
            )
        if objective.startswith("rank:") and self.matrix.has("weight") and len(ranks) > 1:
            warnings.warn(
                f"{objective} with weights on {len(ranks)} workers: XGBoost scales the weights of each worker's groups "
                "to a mean of 1, so the model depends on how groups are spread. Shuffle the groups, or train on one "
                "worker (workers=[...]).",
                UserWarning,
                stacklevel=2,
            )
        for worker in workers:
            parts = [matrix.parts for matrix in self.matrices if not matrix.options.external_memory]
            # Binned, a matrix takes about as much again as its partitions; half of that with few bins.
            need = sum(p.nbytes_on(worker.address) for p in parts)
            free = worker.memory_limit - worker.memory
            if worker.memory_limit and need > free:
                warnings.warn(
                    f"worker {worker.address} holds {format_bytes(need)} of partitions; their matrices need about "
                    f"as much again, and {format_bytes(max(0, free))} of its {format_bytes(worker.memory_limit)} "
                    "are free. Use more or larger workers, or it may be killed.",
                    UserWarning,
                    stacklevel=2,
                )

    def _deliver(self, result: TrainResult, evals_result: dict[str, Any] | None) -> Any:
        if self.folds is not None:
            return result.history
        if evals_result is not None:
            evals_result.update(result.history)
        for ours, theirs in zip(self.loop.callbacks, result.callbacks):
            vars(ours).update(vars(theirs))
        return result.booster


class _Reached:
    """Listens for how many rounds are over, and whether the training is to stop."""

    def __init__(self) -> None:
        self.rounds = 0
        self.finishing = False

    def __call__(self, event: Event) -> None:
        """Hear of one."""
        if isinstance(event, Progress):
            self.rounds = max(self.rounds, event.done)
        elif isinstance(event, FinishAsked):
            self.finishing = True
