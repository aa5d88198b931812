"""What one member does: build its matrices, train with its peers, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xgboost as xgb

from dask_bridges.devices.members import Wanted
from dask_bridges.tally import slept
from dask_bridges.task import WorkerMember
from dask_xgboost import cuts
from dask_xgboost.boosting import Rounds
from dask_xgboost.communicator import capture_log, communicator
from dask_xgboost.devices import own_gpu
from dask_xgboost.dmatrix import MatrixSpec
from dask_xgboost.matrices import build
from dask_xgboost.metrics import AREAS, GlobalMetrics
from dask_xgboost.resuming import Keeper, Keeping, State, left_behind

__all__ = ["TrainResult", "TrainSpec", "train_rank"]

MAX_BIN = 256  # XGBoost's default


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


@dataclass(frozen=True)
class TrainSpec:
    """What one rank is told.

    Attributes
    ----------
    loop : Loop
    train : MatrixSpec
    evals : tuple of (MatrixSpec or None, str)
        None is the training set itself.
    keeping : Keeping or None
        Where the state is kept.
    state : State or None
        To go on from.
    same_cuts : bool
        Whether the cuts are those of `state` as they are, for the rows are elsewhere now.
    devices : Wanted or None
        Its worker's GPU.
    """

    loop: Loop
    train: MatrixSpec
    evals: tuple[tuple[MatrixSpec | None, str], ...]
    keeping: Keeping | None = None
    state: State | None = None
    same_cuts: bool = False
    devices: Wanted | None = None


@dataclass(frozen=True)
class TrainResult:
    """What rank 0 brings back."""

    booster: xgb.Booster
    history: dict[str, Any]
    callbacks: Sequence[Any]


def train_rank(member: WorkerMember, spec: TrainSpec) -> TrainResult | None:
    """Train one rank; rank 0 returns the result.

    The communicator, the matrices and the training share this thread: XGBoost's
    communicator is thread-local.
    """
    loop = spec.loop
    with (
        own_gpu(member, spec.devices),
        left_behind(member),
        capture_log(member),
        communicator(member, loop.tracker_host, loop.tracker_port),
    ):
        booster, history = _trained(member, spec)
    return TrainResult(booster, history, loop.callbacks) if member.rank == 0 else None


def _trained(member: WorkerMember, spec: TrainSpec) -> tuple[xgb.Booster, dict[str, Any]]:
    matrix, evals = _matrices(member, spec)
    with member.span("compute"):
        try:
            return _boost(member, spec, matrix, evals)
        finally:
            member.tally.tell("compute", now=True)


def _matrices(member: WorkerMember, spec: TrainSpec) -> tuple[Any, list[tuple[Any, str]]]:
    """Every rank builds every matrix: XGBoost agrees on cuts and categories between them."""
    params = spec.loop.params
    binning = {
        "max_bin": int(params.get("max_bin", MAX_BIN)),
        "nthread": int(_threads(member, params)),
    }
    matrix, prototype = build(member, spec.train, **binning, ref=_reference(member, spec, binning["max_bin"]))
    evals = []
    for matrix_spec, name in spec.evals:
        if matrix_spec is None:
            evals.append((matrix, name))
        else:
            evals.append((build(member, matrix_spec, **binning, ref=matrix, empty=prototype)[0], name))
    return matrix, evals


def _reference(member: WorkerMember, spec: TrainSpec, max_bin: int) -> Any:
    """What to bin against so that the cuts are those of before; None to find them."""
    if spec.state is None or not spec.same_cuts:
        return None
    matrix = cuts.reference(spec.state.cuts, max_bin, cuts.types(spec.train))
    if matrix is None and not member.rank:
        member.log("the cut points are found anew: those of before cannot be had from a reference", logging.WARNING)
    return matrix


def _threads(member: WorkerMember, params: dict[str, Any]) -> Any:
    """The user's number of threads, by either of its names, or the worker's."""
    return params.get("nthread", params.get("n_jobs", member.worker.state.nthreads))


def _boost(
    member: WorkerMember, spec: TrainSpec, matrix: Any, evals: list[tuple[Any, str]]
) -> tuple[xgb.Booster, dict[str, Any]]:
    loop = spec.loop
    params = {**loop.params, "nthread": _threads(member, loop.params)}
    params.pop("n_jobs", None)
    if "random_state" in params:
        params["seed"] = params.pop("random_state")
    wanted = metric_names(params)
    areas: list[str] = []
    if member.world_size > 1 and not matrix.get_uint_info("group_ptr").size:
        areas = [name for name in wanted if name in AREAS]
    custom = loop.custom_metric
    if areas or (custom is not None and member.world_size > 1):
        custom = _global_metrics(areas, loop)
    remembering = list(loop.callbacks)
    if loop.early_stopping_rounds:
        stopping = xgb.callback.EarlyStopping(rounds=loop.early_stopping_rounds, maximize=loop.maximize)
        remembering.append(stopping)
    rounds = Rounds(
        params=_without(params, wanted, areas),
        total=loop.num_boost_round,
        every=loop.segment,
        model=loop.xgb_model,
        callbacks=[_Report(member, loop.num_boost_round, wanted, evals, custom), *remembering],
        remembering=remembering,
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


def _global_metrics(areas: list[str], loop: Loop) -> GlobalMetrics:
    objective, classes = loop.params.get("objective"), int(loop.params.get("num_class", 0))
    margins = str(objective).startswith("multi:") and (objective != "multi:softprob" or loop.obj is not None)
    return GlobalMetrics(areas, loop.custom_metric, classes if classes > 1 else 0, margins)


def metric_names(params: dict[str, Any]) -> list[str]:
    """The metrics of ``eval_metric``, in the user's order."""
    given = params.get("eval_metric", [])
    return [given] if isinstance(given, str) else [str(name) for name in given]


def _without(params: dict[str, Any], wanted: list[str], areas: list[str]) -> dict[str, Any]:
    """The parameters, less the metrics that `GlobalMetrics` computes."""
    if not areas:
        return params
    left = [name for name in wanted if name not in areas]
    changed = {**params, "eval_metric": left}
    return changed if left else {**changed, "disable_default_eval_metric": 1}


class _Report(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Runs first after each round: puts the metrics in the user's order, and tells the client."""

    def __init__(
        self, member: WorkerMember, total: int, wanted: list[str], evals: list[tuple[Any, str]], custom: Any
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
                for metric in _in_order(self.wanted, list(log), self.metrics.areas):
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


def _in_order(wanted: Sequence[str], found: Sequence[str], areas: Sequence[str]) -> list[str]:
    """The metrics found, in the order of ``eval_metric``; then the user's own.

    >>> _in_order(["auc", "error@0.5", "logloss"], ["error", "logloss", "auc", "mine"], ["auc"])
    ['auc', 'error', 'logloss', 'mine']
    """
    others = iter([name for name in found if name not in areas])  # XGBoost renames some: "error@0.5" is "error"
    ordered = [name if name in areas else next(others, "") for name in dict.fromkeys(wanted)]
    return [name for name in [*ordered, *others] if name in found]
