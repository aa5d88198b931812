"""`train`: the client's side of a distributed training."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xgboost as xgb
from dask.utils import format_bytes
from distributed import Client

from dask_bridges import clients, config, placement
from dask_bridges.devices.members import Wanted
from dask_bridges.errors import DataError
from dask_bridges.gang import Gang, GangPlan
from dask_bridges.ports import port_range
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_xgboost import checks
from dask_xgboost.communicator import is_collective_error
from dask_xgboost.devices import wants_gpus, with_own_gpus
from dask_xgboost.dmatrix import PACKAGES, DMatrix, MatrixOptions, _label, place, prepare
from dask_xgboost.rank import Loop, TrainResult, TrainSpec, train_rank
from dask_xgboost.report import RoundPrinter

__all__ = ["train"]

#: Objectives whose leaves XGBoost fits rank by rank and then averages.
_ADAPTIVE = ("reg:absoluteerror", "reg:quantileerror")


def train(
    client: Client | None,
    params: Mapping[str, Any] | Sequence[tuple[str, Any]],
    X: Any,
    y: Any = None,
    *,
    label: Any = None,
    weight: Any = None,
    base_margin: Any = None,
    qid: Any = None,
    label_lower_bound: Any = None,
    label_upper_bound: Any = None,
    feature_weights: Any = None,
    feature_names: Sequence[str] | None = None,
    feature_types: Sequence[str] | None = None,
    num_boost_round: int = 10,
    evals: Sequence[tuple[Any, str]] | None = None,
    evals_result: dict[str, Any] | None = None,
    obj: Callable[..., Any] | None = None,
    custom_metric: Callable[..., Any] | None = None,
    early_stopping_rounds: int | None = None,
    maximize: bool | None = None,
    callbacks: Sequence[xgb.callback.TrainingCallback] | None = None,
    xgb_model: xgb.Booster | str | os.PathLike[str] | bytearray | None = None,
    verbose_eval: bool | int = False,
    missing: float = float("nan"),
    enable_categorical: bool = True,
    max_bin: int | None = None,
    workers: Sequence[str] | None = None,
    progress: bool | None = None,
    exclusive: bool = True,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
    tracker_host: str | None = None,
    tracker_port: int | str | tuple[int, int] | None = None,
) -> Any:
    """Train a booster on a Dask cluster, on the workers that hold the data.

    The keywords and the result are those of `xgboost.train`. The model equals
    the one a single machine would train, but for the cut points of the
    histogram, which are found from a sketch of the distributed data.

    Parameters
    ----------
    client : distributed.Client or None
        None for the current one. With an asynchronous client the result is awaitable.
    params : mapping
        XGBoost's parameters. ``nthread`` is each worker's number of threads unless set. With
        ``device="cuda"`` each rank has the GPU that its worker owns for itself: the first of that worker's
        ``CUDA_VISIBLE_DEVICES``, as dask-cuda starts them. Workers that own none take no part.
    X : dask dataframe, dask array, or DMatrix
        Shape (rows, features). See `DMatrix` for what it may hold.
    y : dask array, series, or str
        The labels, or the column of the dataframe that holds them; the same as `label`.
    label, weight, base_margin, qid, label_lower_bound, label_upper_bound : optional
        Collections with as many rows as `X`, or names of its columns. With `qid`,
        the weight of a group is that of its first row.
    feature_weights, feature_names, feature_types : optional
        See `DMatrix`.
    num_boost_round : int, default 10
    evals : sequence of tuple, optional
        Of ``(what, name)``, where ``what`` is a `DMatrix`, a dataframe that holds the same label column, or a
        tuple ``(X, y)`` or ``(X, y, weight)``; `X` itself stands for the training set.
        Weights that are a column of `X` are taken where `what` has that column.
    evals_result : dict, optional
        Filled with ``{name: {metric: [value, ...]}}``. Values are those of all rows:
        ``auc`` and ``aucpr`` from the scores of all workers, a custom metric's
        averaged by weight (or rows).
    obj, custom_metric, maximize, early_stopping_rounds : optional
        As in `xgboost.train`. Functions run on every worker, on its rows.
    callbacks : sequence of xgboost.callback.TrainingCallback, optional
        Run on every worker; rank 0's state is copied back into the given objects.
    xgb_model : Booster, path or bytearray, optional
        A model to go on from.
    verbose_eval : bool or int, default False
        Print the metrics here, every round or every n-th.
    missing, enable_categorical : optional
        See `DMatrix`.
    max_bin : int, optional
        The same as ``params["max_bin"]``.
    workers : sequence of str, optional
        Addresses or names of the workers to use.
    progress : bool, optional
        Show a progress bar; by default where a person looks on (terminal, notebook).
    exclusive : bool, default True
        Hold the workers alone: other trainings wait their turn.
    timeout : float or str, optional
        Longest wait for workers, for the turn, and for GPUs (``dask-bridges.timeout``).
    allow_plaintext : bool, optional
        On a ``tls://`` cluster, consent to XGBoost's own traffic being plain TCP.
    tracker_host, tracker_port : optional
        Where XGBoost's tracker listens, on the worker of rank 0: an address, and a
        port or range ``"9000:9010"`` (``dask-bridges.xgboost.tracker-host`` and
        ``-port``). The ranks' own ports cannot be chosen in XGBoost 3.

    Returns
    -------
    xgboost.Booster

    Raises
    ------
    DataError
        If the data cannot be trained on; says which collection, partition, column.
    PlacementError
        If workers are missing, paused, or lack XGBoost in the client's version; with ``device="cuda"``, if
        none owns a GPU, or others hold it for too long.
    GangTimeout
        If the workers were not free in time.
    MemberFailed
        If training failed on a worker; the original error is its ``__cause__``.
    MemberLost
        If a worker died.
    ValueError
        If a parameter cannot be used on a cluster.

    Examples
    --------
    >>> from distributed import Client
    >>> import dask.array as da, dask_xgboost
    >>> client = Client(processes=False, dashboard_address=None)
    >>> X = da.random.random((1000, 3), chunks=(250, 3))
    >>> booster = dask_xgboost.train(client, {"max_depth": 2}, X, X[:, 0] * 2, num_boost_round=3)
    >>> booster.num_boosted_rounds()
    3
    >>> client.close()
    """
    client = clients.current(client)
    settings = dict(params)
    if isinstance(params, Sequence) and len(settings) < len(params):
        settings["eval_metric"] = [value for name, value in params if name == "eval_metric"]
    if max_bin is not None:
        settings["max_bin"] = max_bin
    checks.check_params(settings)
    placement.refuse_plaintext(client, allow_plaintext, "XGBoost's tracker and collective traffic")
    given = {"label": _label(y, label), "weight": weight, "base_margin": base_margin, "qid": qid,
             "label_lower_bound": label_lower_bound, "label_upper_bound": label_upper_bound}  # fmt: skip
    options = MatrixOptions(feature_weights, feature_names, feature_types, missing, enable_categorical)
    matrix = _matrix(client, X, given, options, "X")
    loop = Loop(
        params=settings,
        num_boost_round=num_boost_round,
        obj=obj,
        custom_metric=custom_metric,
        early_stopping_rounds=early_stopping_rounds,
        maximize=maximize,
        callbacks=_checked_callbacks(callbacks),
        xgb_model=_raw(xgb_model),
        tracker_host=config.get("xgboost.tracker-host", tracker_host),
        tracker_port=config.get("xgboost.tracker-port", tracker_port),
    )
    port_range(loop.tracker_port, "tracker_port")
    if early_stopping_rounds and not evals:
        raise DataError("early_stopping_rounds needs rows to look at: pass evals=[(what, name)]")
    training = _Training(
        client, loop, matrix, _evals(client, evals or (), X, matrix, given),
        workers=workers, timeout=timeout, exclusive=exclusive,
    )  # fmt: skip
    prepare(client, training.matrices)
    listeners: list[Any] = [RoundPrinter(verbose_eval)] if verbose_eval else []
    if wants_bar(progress):
        listeners.append(ProgressBar("XGBoost"))
    return clients.call(client, training.run, listeners, evals_result)


def _matrix(client: Client, X: Any, fields: dict[str, Any], options: MatrixOptions, role: str) -> DMatrix:
    if isinstance(X, DMatrix):
        extra = [name for name, value in fields.items() if value is not None]
        if extra:
            raise DataError(f"{role} is a DMatrix, which has its own fields: pass {extra} when it is made")
        return X
    return DMatrix.unplaced(client, X, fields, options, role)


def _evals(
    client: Client,
    evals: Sequence[tuple[Any, str]],
    X: Any,
    matrix: DMatrix,
    given: dict[str, Any],
) -> list[tuple[DMatrix, str]]:
    """A matrix for each evaluation set; the training matrix itself where that is meant."""
    options = dataclasses.replace(matrix.options, feature_weights=None)
    sets: list[tuple[DMatrix, str]] = []
    for entry in evals:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], str)):
            raise DataError("evals is a sequence of (what, name), such as evals=[(valid, 'valid')]")
        what, name = entry
        role = f"evals {name!r}"
        if "-" in name or name in [known for _, known in sets]:
            raise DataError(f"{role}: names are unique and have no '-'")
        if what is X or what is matrix:
            sets.append((matrix, name))
            continue
        fields = {field: value for field, value in given.items() if isinstance(value, str)} or matrix.columns
        if isinstance(what, tuple):
            what, *rest = what
            fields = {**fields, **dict(zip(("label", "weight"), rest))}
        if isinstance(fields.get("weight"), str) and fields["weight"] not in getattr(what, "columns", ()):
            fields = {field: value for field, value in fields.items() if field != "weight"}
        other = _matrix(client, what, {} if isinstance(what, DMatrix) else dict(fields), options, role)
        _check_features(matrix, other, role)
        sets.append((other, name))
    return sets


def _check_features(matrix: DMatrix, other: DMatrix, role: str) -> None:
    ours, theirs = matrix.feature_names, other.feature_names
    if ours != theirs and ours is not None and theirs is not None:
        missing, extra = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
        detail = f"missing {missing}, unknown {extra}" if missing or extra else f"order {theirs}, not {ours}"
        raise DataError(f"{role} has other features than the training set: {detail}")
    if matrix.num_features != other.num_features:
        raise DataError(f"{role} has {other.num_features} features and the training set {matrix.num_features}")


def _checked_callbacks(callbacks: Sequence[Any] | None) -> tuple[Any, ...]:
    for callback in callbacks or ():
        if not isinstance(callback, xgb.callback.TrainingCallback):
            raise TypeError(f"callbacks are xgboost.callback.TrainingCallback objects, not {callback!r}")
    return tuple(callbacks or ())


def _raw(model: Any) -> bytes | None:
    """A model as bytes, which every rank loads."""
    if model is None:
        return None
    booster = model if isinstance(model, xgb.Booster) else xgb.Booster(model_file=model)
    return bytes(booster.save_raw("ubj"))


class _Training:
    """One call of `train`: data in place, a gang on it, the result in the caller's objects."""

    def __init__(
        self,
        client: Client,
        loop: Loop,
        matrix: DMatrix,
        evals: list[tuple[DMatrix, str]],
        *,
        workers: Sequence[str] | None,
        timeout: float | str | None,
        exclusive: bool,
    ) -> None:
        self.client = client
        self.loop = loop
        self.matrix = matrix
        self.evals = evals
        self.workers = workers
        self.timeout = timeout
        self.exclusive = exclusive
        self.gpus = wants_gpus(loop.params)
        self.devices: dict[str, Wanted] = {}  # by the workers' addresses, where GPUs train

    @property
    def matrices(self) -> list[DMatrix]:
        """The training matrix, and those of the evaluation sets, each once."""
        return list({id(matrix): matrix for matrix in (self.matrix, *(matrix for matrix, _ in self.evals))}.values())

    async def run(self, listeners: Sequence[Any], evals_result: dict[str, Any] | None) -> xgb.Booster:
        """Place, train, and bring back rank 0's result."""
        ranks = await self._place()
        plan = GangPlan(
            label="XGBoost training",
            function=train_rank,
            payloads=self._specs(ranks),
            workers=ranks,
            exclusive=self.exclusive,
            timeout=self.timeout,
            collateral=is_collective_error,
        )
        gang = Gang(self.client, plan)
        for listener in listeners:
            gang.events.listen(listener)
        try:
            results = await gang.run()
        finally:
            for listener in listeners:
                getattr(listener, "close", lambda: None)()
        return self._deliver(results[0], evals_result)

    async def _place(self) -> list[str]:
        """The workers by rank: those that hold rows of the training set; all data moved to them."""
        matrices = self.matrices
        usable = await self._usable()
        await place(self.client, matrices, [worker.address for worker in usable] if self.devices else self.workers)
        for matrix in matrices:
            if self.loop.obj is None:
                checks.check_labels(matrix.role, self.loop.params, matrix.infos)
        usable = await self._usable()
        await self.matrix.parts.spread(self.client, [worker.address for worker in usable])
        ranks = self.matrix.parts.holding()
        await placement.check_packages(self.client, ranks, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
        for matrix in matrices[1:]:
            await matrix.place_like(ranks, everywhere=bool(self._categories()))
        self._warn(ranks, [worker for worker in usable if worker.address in ranks])
        return ranks

    async def _usable(self) -> list[placement.WorkerInfo]:
        """The workers that can train now: with GPUs, those that own one."""
        workers = await placement.usable_workers(self.client, self.workers, config.seconds("timeout", self.timeout))
        if not self.gpus:
            return workers
        addresses = [worker.address for worker in workers]
        await placement.check_packages(self.client, addresses, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
        workers, self.devices = await with_own_gpus(
            self.client, workers, named=self.workers is not None, timeout=self.timeout
        )
        return workers

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

    def _specs(self, ranks: Sequence[str]) -> list[TrainSpec]:
        categories = self._categories()
        return [
            TrainSpec(
                self.loop,
                self.matrix.spec(worker, categories),
                tuple(
                    (None if matrix is self.matrix else matrix.spec(worker, categories), name)
                    for matrix, name in self.evals
                ),
                self.devices[worker] if self.devices else None,
            )
            for worker in ranks
        ]

    def _warn(self, ranks: Sequence[str], workers: Sequence[placement.WorkerInfo]) -> None:
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
            parts = [matrix.parts for matrix in self.matrices]
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

    def _deliver(self, result: TrainResult, evals_result: dict[str, Any] | None) -> xgb.Booster:
        if evals_result is not None:
            evals_result.update(result.history)
        for ours, theirs in zip(self.loop.callbacks, result.callbacks):
            vars(ours).update(vars(theirs))
        return result.booster
