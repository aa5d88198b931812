"""What one member does: build its matrices, train with its peers, report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xgboost as xgb
from xgboost import collective

from dask_bridges.devices.members import Wanted
from dask_bridges.task import WorkerMember
from dask_xgboost.boosting import Rounds
from dask_xgboost.communicator import capture_log, communicator
from dask_xgboost.devices import own_gpu
from dask_xgboost.metrics import AREAS, GlobalMetrics
from dask_xgboost.ready import Agreed, MatricesSpec, agree, ready
from dask_xgboost.resident import Built, lent
from dask_xgboost.resuming import Keeper, Keeping, State, left_behind

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
        Its worker's GPU.
    finishing : bool
        Whether an earlier attempt was asked to stop.
    """

    loop: Loop
    matrices: MatricesSpec
    evals: tuple[tuple[int, str], ...]
    keeping: Keeping | None = None
    state: State | None = None
    devices: Wanted | None = None
    finishing: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What rank 0 brings back.

    Attributes
    ----------
    booster : xgboost.Booster or None
        None where matrices are lacking, see `Agreed`.
    history : dict
    callbacks : sequence of TrainingCallback
    agreed : Agreed
    """

    booster: xgb.Booster | None
    history: dict[str, Any]
    callbacks: Sequence[Any]
    agreed: Agreed


def train_rank(member: WorkerMember, spec: TrainSpec) -> TrainResult | None:
    """Train one rank; rank 0 returns the result.

    The communicator and the training share this thread: XGBoost's
    communicator is thread-local.
    """
    loop = spec.loop
    member.finishing |= spec.finishing
    with (
        own_gpu(member, spec.devices),
        left_behind(member),
        capture_log(member),
        xgb.config_context(**loop.config),
        communicator(member, loop.tracker_host, loop.tracker_port),
        lent(member, [each.held for each in spec.matrices.each]) as held,
    ):
        agreed = agree(member, spec.matrices, held)
        booster, history = (None, {}) if agreed.lacking else _trained(member, spec, agreed, held)
    return TrainResult(booster, history, loop.callbacks, agreed) if member.rank == 0 else None


def _trained(
    member: WorkerMember, spec: TrainSpec, agreed: Agreed, held: Sequence[Built | None]
) -> tuple[xgb.Booster, dict[str, Any]]:
    matrices = ready(member, spec.matrices, agreed, held, int(_threads(member, spec.loop.params)))
    with member.span("compute"):
        return _boost(member, spec, matrices[0], [(matrices[number], name) for number, name in spec.evals])


def _threads(member: WorkerMember, params: dict[str, Any]) -> Any:
    """The user's number of threads, by either of its names; the worker's for none, or a number below one."""
    wanted = params.get("nthread", params.get("n_jobs", 0))
    return wanted if int(wanted) > 0 else member.worker.state.nthreads


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
    if areas or custom is not None:
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


def _agreed(member: WorkerMember, wanted: bool) -> bool:
    """Whether the ranks end here, since one wants to: it must not leave the others waiting for it."""
    if member.world_size == 1:
        return bool(wanted)
    return bool(collective.allreduce(np.array([wanted], dtype="int8"), collective.Op.MAX)[0])


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
        return False


class _Finish(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Ends the training after a round, last of all callbacks, where somebody has asked for it."""

    def __init__(self, member: WorkerMember) -> None:
        self.member = member

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Ask the other ranks to end, too."""
        return self.member.finishing


def _in_order(wanted: Sequence[str], found: Sequence[str], areas: Sequence[str]) -> list[str]:
    """The metrics found, in the order of ``eval_metric``; then the user's own.

    >>> _in_order(["auc", "error@0.5", "logloss"], ["error", "logloss", "auc", "mine"], ["auc"])
    ['auc', 'error', 'logloss', 'mine']
    """
    others = iter([name for name in found if name not in areas])  # XGBoost renames some: "error@0.5" is "error"
    ordered = [name if name in areas else next(others, "") for name in dict.fromkeys(wanted)]
    return [name for name in [*ordered, *others] if name in found]
