"""What one member does: build its matrices, train with its peers, report."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xgboost as xgb
from xgboost import collective

from dask_bridges.devices.members import Wanted
from dask_bridges.member import Member
from dask_bridges.tally import slept
from dask_xgboost.boosting import Rounds
from dask_xgboost.communicator import capture_log, communicator
from dask_xgboost.folds import Folds, masks
from dask_xgboost.metrics import AREAS, GlobalMetrics, in_order, metric_names, without
from dask_xgboost.ready import Agreed, MatricesSpec, agree, ready
from dask_xgboost.resident import Built, lent
from dask_xgboost.resuming import Keeper, Keeping, State
from dask_xgboost.sides import sides_of
from dask_xgboost.validating import History, Newest, Run, cross_validate

__all__ = ["TrainResult", "TrainSpec", "train_rank"]


@dataclass(frozen=True)
class Loop:
    """The part of a training that is the same on every rank: the keywords of `xgboost.train`."""

    params: dict[str, Any]
    num_boost_round: int
    obj: Callable[..., Any] | None = None
    custom_metric: Callable[..., Any] | None = None
    early_stopping_rounds: int | None = None
    maximize: bool | None = None
    callbacks: Sequence[Any] = ()
    xgb_model: bytes | None = None
    tracker_host: str | None = None
    tracker_port: int | str | tuple[int, int] = 0
    segment: int = 10
    config: dict[str, Any] = field(default_factory=dict)  # the client's `xgboost.get_config`
    cuts: str = "auto"


@dataclass(frozen=True)
class TrainSpec:
    """What one rank is told.

    Attributes
    ----------
    loop : Loop
    matrices : MatricesSpec
    evals : tuple of (int, str)
        The number of the matrix, 0 for the training set itself, and the name.
    keeping : Keeping or None
        Where the state is kept.
    state : State or None
        To go on from.
    devices : Wanted or None
        The GPUs of which it has one.
    finishing : bool
        Whether an earlier attempt was asked to stop.
    folds : Folds or None
        Of a cross-validation.
    """

    loop: Loop
    matrices: MatricesSpec
    evals: tuple[tuple[int, str], ...]
    keeping: Keeping | None = None
    state: State | None = None
    devices: Wanted | None = None
    finishing: bool = False
    folds: Folds | None = None

    def using(self, threads: int) -> TrainSpec:
        """With the user's number of threads, by either of its names; so many for none, or a number below one."""

        def told(params: dict[str, Any]) -> dict[str, Any]:
            wanted = int(params.get("nthread", params.get("n_jobs", 0)))
            rest = {name: value for name, value in params.items() if name != "n_jobs"}
            return {**rest, "nthread": wanted if wanted > 0 else threads}

        folds = self.folds and replace(self.folds, params=tuple(map(told, self.folds.params)))
        return replace(self, loop=replace(self.loop, params=told(self.loop.params)), folds=folds)


@dataclass(frozen=True)
class TrainResult:
    """What rank 0 brings back.

    Attributes
    ----------
    booster : xgboost.Booster or None
        None where matrices are lacking, see `Agreed`, and of a cross-validation.
    history : dict, or list of dict
    callbacks : sequence of TrainingCallback
    agreed : Agreed
    """

    booster: xgb.Booster | None
    history: Any
    callbacks: Sequence[Any]
    agreed: Agreed


def train_rank(member: Member, spec: TrainSpec, built: Callable[[], object] = int) -> TrainResult | None:
    """Train one rank; rank 0 returns the result.

    The communicator and the training share this thread: XGBoost's
    communicator is thread-local. `built` is called once the partitions are not needed any more.
    """
    loop = spec.loop
    member.finishing |= spec.finishing
    with (
        capture_log(member),
        xgb.config_context(**loop.config),
        communicator(member, loop.tracker_host, loop.tracker_port),
        lent(member, [each.held for each in spec.matrices.each]) as held,
        _nothing_held_by_errors(),
    ):
        agreed = agree(member, spec.matrices, held)
        booster, history = (None, {}) if agreed.lacking else _trained(member, spec, agreed, held, built)
    return TrainResult(booster, history, loop.callbacks, agreed) if member.rank == 0 else None


@contextlib.contextmanager
def _nothing_held_by_errors() -> Iterator[None]:
    """Let go of matrices, and so of what they have on disk, whoever keeps the error that ends a training."""
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise


def _trained(
    member: Member, spec: TrainSpec, agreed: Agreed, held: Sequence[Built | None], built: Callable[[], object]
) -> tuple[xgb.Booster | None, Any]:
    matrices = ready(member, spec.matrices, agreed, held, spec.loop.params["nthread"])
    built()
    with member.span("compute"):
        try:
            if spec.folds is not None:
                return None, _cross_validated(member, spec.loop, spec.folds, matrices[0])
            return _boost(member, spec, matrices[0], [(matrices[number], name) for number, name in spec.evals])
        finally:
            member.tally.tell("compute", now=True)


def _boost(
    member: Member, spec: TrainSpec, matrix: Any, evals: list[tuple[Any, str]]
) -> tuple[xgb.Booster, dict[str, Any]]:
    loop = spec.loop
    params, areas, custom = _told(member, loop, loop.params, matrix)
    wanted = metric_names(params)
    remembering = _callbacks(loop)
    rounds = Rounds(
        params=without(params, wanted, areas),
        total=loop.num_boost_round,
        every=loop.segment,
        model=loop.xgb_model,
        callbacks=[_Report(member, loop.num_boost_round, wanted, evals, custom), *remembering, _Finish(member)],
        remembering=remembering,
        agreed=functools.partial(_agreed, member),
        obj=loop.obj,
        custom_metric=custom,
    )
    keeper = None
    if spec.keeping is not None:
        keeper = Keeper(member, spec.keeping, remembering, matrix.get_quantile_cut())
    booster, history = rounds.boost(matrix, evals, keeper, spec.state)
    if areas:
        default = params.get("disable_default_eval_metric", 0)
        booster.set_param([("disable_default_eval_metric", default), *(("eval_metric", name) for name in areas)])
    return booster, history


def _told(
    member: Member, loop: Loop, given: dict[str, Any], matrix: Any
) -> tuple[dict[str, Any], list[str], GlobalMetrics | None]:
    """What XGBoost is told: parameters; which of their metrics are computed here; these, with the user's own."""
    params = dict(given)
    if "random_state" in params:
        params["seed"] = params.pop("random_state")
    areas: list[str] = []
    if member.world_size > 1 and not matrix.get_uint_info("group_ptr").size:
        areas = [name for name in metric_names(params) if name in AREAS]
    return params, areas, _global_metrics(areas, loop, given) if areas or loop.custom_metric is not None else None


def _callbacks(loop: Loop) -> list[Any]:
    """The user's, and that of early stopping."""
    if not loop.early_stopping_rounds:
        return list(loop.callbacks)
    stopping = xgb.callback.EarlyStopping(rounds=loop.early_stopping_rounds, maximize=loop.maximize)
    return [*loop.callbacks, stopping]


def _cross_validated(member: Member, loop: Loop, folds: Folds, matrix: Any) -> list[History]:
    """The history of each set of parameters."""
    told = [_told(member, loop, given, matrix) for given in folds.params]
    proxied = any(custom is not None for *_, custom in told)
    sides = sides_of(member, matrix, folds, masks(folds, matrix.get_label()), proxied=proxied)
    histories: list[History] = []
    for params, areas, custom in told:
        done = len(histories) * loop.num_boost_round

        def tell(number: int, newest: Newest, done: int = done) -> None:
            if member.rank == 0:
                means = {f"{name}-{metric}-mean": mean for (name, metric), (mean, _) in newest.items()}
                stds = {f"{name}-{metric}-std": deviation for (name, metric), (_, deviation) in newest.items()}
                member.metrics(done + number, means | stds)
                member.progress(done + number + 1, len(told) * loop.num_boost_round)

        run = Run(
            rounds=loop.num_boost_round,
            params=without(params, metric_names(params), areas),
            wanted=metric_names(params),
            callbacks=_callbacks(loop),
            obj=loop.obj,
            metrics=custom,
            agreed=functools.partial(_agreed, member),
        )
        histories.append(cross_validate(member, matrix, sides, run, tell))
        if member.finishing:
            break
    return histories


def _agreed(member: Member, wanted: bool) -> bool:
    """Whether the ranks end here, since one wants to: it must not leave the others waiting for it."""
    if member.world_size == 1:
        return bool(wanted)
    return bool(collective.allreduce(np.array([wanted], dtype="int8"), collective.Op.MAX)[0])


def _global_metrics(areas: list[str], loop: Loop, params: dict[str, Any]) -> GlobalMetrics:
    objective, classes = params.get("objective"), int(params.get("num_class", 0))
    margins = str(objective).startswith("multi:") and (objective != "multi:softprob" or loop.obj is not None)
    return GlobalMetrics(areas, loop.custom_metric, classes if classes > 1 else 0, margins)


class _Report(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Runs first after each round: puts the metrics in the user's order, and tells the client."""

    def __init__(
        self, member: Member, total: int, wanted: list[str], evals: list[tuple[Any, str]], custom: Any
    ) -> None:
        self.member = member
        self.total = total
        self.wanted = wanted
        self.evals = evals
        self.metrics = custom if isinstance(custom, GlobalMetrics) else None
        member.tally.begin()
        self._slept = slept()

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Ranks that were asked to stop end here."""
        self.member.check()
        if self.metrics is not None:
            self.metrics.model = model
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Early stopping looks at the last metric of the last set, so their order counts."""
        if self.metrics is not None:
            for matrix, name in self.evals:
                log = evals_log.get(name, {})
                for metric in in_order(self.wanted, list(log), self.metrics.areas):
                    log.move_to_end(metric)
                    log[metric][-1] = self.metrics.exact.get((id(matrix), metric), log[metric][-1])
        if self.member.rank == 0:
            newest = {f"{name}-{m}": v[-1] for name, log in evals_log.items() for m, v in log.items()}
            if newest:
                self.member.metrics(epoch, newest)
            self.member.progress(epoch + 1, self.total)
        if self.member.tally.due:
            self._tell_time()
        return False

    def after_training(self, model: Any) -> Any:
        """The last window ends."""
        self._tell_time()
        return model

    def _tell_time(self) -> None:
        """What the last rounds went into: XGBoost sleeps in its collective only."""
        before, self._slept = self._slept, slept()
        if self.member.world_size > 1:  # alone it has no peers to wait for
            self.member.tally.add("communicate", self._slept - before)
        self.member.tally.tell("compute", now=True)


class _Finish(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Ends the training after a round, last of all callbacks, where somebody has asked for it."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Ask the other ranks to end, too."""
        return self.member.finishing
