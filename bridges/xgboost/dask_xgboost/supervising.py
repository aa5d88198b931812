"""The client's side of a training: attempts, each from what was kept of those before, until there is a result."""

from __future__ import annotations

import asyncio
import logging
import pickle
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client

from dask_bridges import safekeeping
from dask_bridges.errors import BridgeError, DataError, MemberLost, PlacementError, WorkerLeft
from dask_bridges.events import Event, FinishAsked, Progress
from dask_bridges.gang import Gang, GangPlan
from dask_xgboost import checks, dmatrix, resuming
from dask_xgboost.communicator import is_collective_error
from dask_xgboost.datasets import Datasets
from dask_xgboost.dealing import Asked
from dask_xgboost.devices import wants_gpus
from dask_xgboost.dmatrix import DMatrix
from dask_xgboost.hosting import train_here, train_in_child
from dask_xgboost.places import LABEL, Places
from dask_xgboost.rank import Loop, TrainResult
from dask_xgboost.residency import Residency
from dask_xgboost.resuming import Keeping, State
from dask_xgboost.seating import Seating
from dask_xgboost.specs import Told
from dask_xgboost.warned import warn_of_memory, warn_of_objective

__all__ = ["Supervised"]

logger = logging.getLogger(__name__)

#: A training is given up when so many attempts, one after the other, have come no further than those before.
BARREN = 2

MAX_BIN = 256  # XGBoost's default

#: So often partitions are brought back that were not there when a training began.
FETCHES = 3

#: Seconds for which a training that is over waits at most for what its workers are to keep.
SETTLED_WITHIN = 0.1


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
    folds: Asked | None = None
    _gang: Gang | None = None
    _finishing: bool = False  # whether somebody has asked it to stop

    def __post_init__(self) -> None:
        params = self.loop.params
        max_bin = int(params.get("max_bin", MAX_BIN))
        self._sets = Datasets(self.matrix, self.evals, max_bin, self.loop.cuts, wants_gpus(params))
        external = [matrix.role for matrix in self._sets.each if matrix.options.external_memory]
        if external and self._sets.gpus:
            raise DataError(
                f"{external[0]} is in external memory, which is the worker's disk, and device='cuda' trains on what is "
                "in the GPU's memory: leave external_memory or device out"
            )
        self._residency = Residency(self.client, self._sets)
        self._seating = Seating(self.client, self._sets, self._residency, self.places)
        self._told = Told(uuid.uuid4().hex[:12], self.loop, self._sets, self.folds, self.keeping)

    def prepare(self) -> None:
        """Align the collections, in the caller's thread."""
        dmatrix.prepare(self.client, self._sets.each)

    async def run(self, evals_result: dict[str, Any] | None) -> Any:
        """Train, and bring back rank 0's result: the booster, or the histories of a cross-validation."""
        try:
            return self._deliver(await self._attempts(), evals_result)
        finally:
            for matrix in self._sets.each:
                if matrix.release and matrix.placed:
                    matrix.parts.release()
            for listener in self.listeners:
                getattr(listener, "close", int)()

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
                    await self._seating.place_as(state.placement)
                result = await self._attempt_with_all_data(restarts + 1, state, reached)
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
                self._residency.adopt(self._seating.ranks, None)
                restarts, earlier = restarts + 1, lost
                logger.warning("%s It goes on from what was kept; round %d had been reached.", lost, come)
            except BridgeError as error:
                await self._kept(wanted=False)
                await self._residency.disown(self._seating.ranks)
                error.__cause__ = error.__cause__ or earlier
                raise
            else:
                self._residency.adopt(self._seating.ranks, result.agreed)
                if self.loop.num_boost_round > self.loop.segment:
                    # Both at once: of tasks that are not over, a cluster that is closed next would warn.
                    await asyncio.gather(self._kept(wanted=False), self._residency.taken(within=SETTLED_WITHIN))
                return result

    def _is_taken_away(self) -> bool:
        """Whether there is nothing to go on with: the scheduler is gone, or the data are, as by `Client.restart`."""
        placed = [matrix.parts for matrix in self._sets.each if matrix.placed]
        held = [parts.futures for parts in placed if not parts.released]
        return self.client.status != "running" or any(f.status == "cancelled" for futures in held for f in futures)

    async def _place(self) -> None:
        """See that ranks and data are there; the first time, hold the data against what is asked of them."""
        first = not self._seating.ranks
        await self._seating.place()
        if first:
            self._check()
            warn_of_objective(str(self.loop.params.get("objective", "")), self._sets, len(self._seating.ranks))
            warn_of_memory(self._sets, self._seating.newly)

    def _check(self) -> None:
        """Refuse what the objective does not take, and what several ranks cannot do."""
        for params in [self.loop.params] if self.folds is None else self.folds.params:
            for matrix in self._sets.each:
                if self.loop.obj is None:
                    checks.check_labels(matrix.role, params, matrix.infos)
            checks.check_ranks(params, len(self._seating.ranks))

    async def _attempt_with_all_data(self, number: int, state: State | None, reached: _Reached) -> TrainResult:
        """An attempt, begun again where partitions are neither there nor binned: memory was short, or they moved."""
        result = await self._attempt(number, state, reached)
        for _ in range(FETCHES):
            if not result.agreed.lacking:
                return result
            self._residency.forget(self._seating.ranks, result.agreed.lacking)
            await self._place()
            result = await self._attempt(number, state, reached)
        if lacking := result.agreed.lacking:
            raise PlacementError(
                f"partitions were taken from {sorted({self._seating.ranks[rank] for rank, _ in lacking})} before they "
                "could be binned, again and again: is the cluster being rebalanced?"
            )
        return result

    async def _attempt(self, number: int, state: State | None, reached: _Reached) -> TrainResult:
        if self.folds is not None:
            await self.folds.settle(self.client, self.matrix)
        await self._residency.taken()
        ranks = self._seating.ranks
        plan = GangPlan(
            label=LABEL,
            function=train_here if self._seating.owned else train_in_child,
            payloads=self._told.specs(self._seating, self._residency, state, finishing=self._finishing),
            workers=ranks,
            collateral=is_collective_error,
            timeout=self.places.timeout,
            exclusive=self.exclusive,
            finishes=True,
            about=self._told.about(ranks),
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
        described, rounds = self._told.described(), self.loop.num_boost_round
        return await asyncio.to_thread(resuming.load, keeping.checkpoints, described, rounds)

    async def _kept(self, *, wanted: bool = True) -> State | None:
        """What the ranks that are left have kept of the last attempt, which they forget."""
        gang, self._gang = self._gang, None
        if gang is None or self.keeping is None or self.keeping.checkpoints is not None or not self.max_restarts:
            return None
        state: State | None = await safekeeping.collect(self.client, gang.id, self._seating.ranks, wanted=wanted)
        return state

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
