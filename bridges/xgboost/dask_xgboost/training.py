"""`train`: the client's side of a distributed training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xgboost as xgb
from distributed import Client

from dask_bridges import clients, config, placement
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.errors import DataError
from dask_bridges.events import Listener
from dask_bridges.ports import port_range
from dask_bridges.reporting import Recorder, asked, reported
from dask_bridges.ui.progress import ProgressBar, wants_bar
from dask_xgboost import checks, external, known, resuming
from dask_xgboost.definition import label_of
from dask_xgboost.dmatrix import DMatrix
from dask_xgboost.matrixspec import MatrixOptions
from dask_xgboost.places import Places
from dask_xgboost.rank import Loop
from dask_xgboost.report import RoundPrinter
from dask_xgboost.resuming import Keeping
from dask_xgboost.supervising import Supervised

__all__ = ["checked_callbacks", "listeners_of", "matrix_of", "settings_of", "train"]


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
    cuts: str = "auto",
    external_memory: bool | str | os.PathLike[str] = False,
    workers: Sequence[str] | None = None,
    n_workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    progress: bool | None = None,
    listen: Listener | None = None,
    checkpoint: str | Path | Checkpoints | None = None,
    checkpoint_every: int = 10,
    max_restarts: int = 3,
    exclusive: bool = True,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
    report: str | Path | None = None,
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
        ``device="cuda"`` each rank has a GPU for itself: in its worker's own process where every worker that sees
        GPUs owns one, the first of its ``CUDA_VISIBLE_DEVICES``, as dask-cuda starts them; else in a child process
        of the worker, on one of its host's.
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
        ``auc`` and ``aucpr`` from the scores of all workers.
    obj, maximize, early_stopping_rounds : optional
        As in `xgboost.train`. `obj` runs on every worker, on its rows.
    custom_metric : callable, optional
        ``custom_metric(predictions, matrix)`` as in `xgboost.train`; it runs on every worker, on its rows, and gives
        ``(name, value)``, of which the average by weight (or rows) is taken; or ``(name, (numerator, denominator))``,
        which are summed over the workers and then divided; or a list of such. With `gathered` it runs once, on the
        predictions of all rows.
    callbacks : sequence of xgboost.callback.TrainingCallback, optional
        Run on every worker; rank 0's state is copied back into the given objects. Where a training goes on after a
        loss, `before_training` is called again, and then they have back what can be pickled of their state (from
        `checkpoint`, what JSON can hold).
    xgb_model : Booster, path or bytearray, optional
        A model to go on from.
    verbose_eval : bool or int, default False
        Print the metrics here, every round or every n-th.
    missing, enable_categorical : optional
        See `DMatrix`.
    max_bin : int, optional
        The same as ``params["max_bin"]``.
    cuts : {"auto", "quantiles", "sketch"}
        Where columns are cut into bins: at the quantiles of all rows, each within a ``1 / (4 * max_bin)`` of the
        exact one, whose cuts do not depend on where partitions lie; or where XGBoost's own sketch of each
        worker's rows says, which takes longer. "auto" is "quantiles" from 100,000 rows on, and "sketch" on GPUs and
        for sparse matrices.
    external_memory : bool or path, default False
        Keep what is binned on the workers' disks, for data that are larger than their memory, also of evaluation
        sets. See `DMatrix`; a matrix that is given says so itself.
    workers : sequence of str, optional
        Addresses or names of the workers to use.
    n_workers : int, optional
        Use so many of them at most, those that hold most of the rows, and wait until there are so many.
    resources : mapping, optional
        Use workers that declare so much of each resource, such as ``{"memory": 64e9}``: those that were started with
        ``dask worker --resources``. Nothing of it is taken away from Dask's own tasks.
    progress : bool, optional
        Show a progress bar; by default where a person looks on (terminal, notebook).
    listen : callable, optional
        Called here with everything the workers tell, as it comes (`dask_bridges.events`): the metrics of each round,
        progress, log lines. It runs on the client's event loop and must not block.
    checkpoint : str, Path or Checkpoints, optional
        A folder that all hosts share, or any other fsspec URL that they reach: rank 0 keeps the state there, and
        what is there is gone on from, by this call where workers are lost and by a later one. By default every
        worker keeps it in its memory, so that all but the loss of all workers at once costs no more than the
        rounds since then.
    checkpoint_every : int, default 10
        Rounds between two. A segment of so many rounds has random numbers of its own, whether anything is kept
        and lost or not: what is sampled depends on it.
    max_restarts : int, default 3
        How often the training is started again on the workers that are left, and those that have come back, when
        one is lost; two attempts, one after the other, that come no further than those before end it earlier. With
        0 the loss of a worker ends the training.
    exclusive : bool, default True
        Hold the workers alone: other trainings wait their turn.
    timeout : float or str, optional
        Longest wait for workers, for the turn, and for GPUs (``dask-bridges.timeout``).
    allow_plaintext : bool, optional
        On a ``tls://`` cluster, consent to XGBoost's own traffic being plain TCP.
    report : str or Path, optional
        Where to write a page of who did what when, at the end, see `dask_bridges.report`.
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
        none has a GPU, or others hold it for too long.
    GangTimeout
        If the workers were not free in time.
    MemberFailed
        If training failed on a worker; the original error is its ``__cause__``.
    MemberLost
        If workers died, more often than `max_restarts` or again and again at the same round.
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
    recorder = asked(report)
    settings = settings_of(params, max_bin)
    checks.check_params(settings)
    placement.refuse_plaintext(client, allow_plaintext, "XGBoost's tracker and collective traffic")
    given = {"label": label_of(y, label), "weight": weight, "base_margin": base_margin, "qid": qid,
             "label_lower_bound": label_lower_bound, "label_upper_bound": label_upper_bound}  # fmt: skip
    disk = external.checked(external_memory)
    if disk and isinstance(X, DMatrix):
        raise DataError("X is a DMatrix: pass external_memory when it is made")
    options = MatrixOptions(feature_weights, feature_names, feature_types, missing, enable_categorical, disk)
    matrix = matrix_of(client, X, given, options, "X")
    loop = Loop(
        params=settings,
        num_boost_round=num_boost_round,
        obj=obj,
        custom_metric=custom_metric,
        early_stopping_rounds=early_stopping_rounds,
        maximize=maximize,
        callbacks=checked_callbacks(callbacks),
        xgb_model=_raw(xgb_model),
        tracker_host=config.get("xgboost.tracker-host", tracker_host),
        tracker_port=config.get("xgboost.tracker-port", tracker_port),
        segment=max(1, num_boost_round) if _unkept(settings) else checkpoint_every,
        config=xgb.get_config(),
        cuts=cuts,
    )
    checks.check_cuts(cuts)
    port_range(loop.tracker_port, "tracker_port")
    if early_stopping_rounds and not evals:
        raise DataError("early_stopping_rounds needs rows to look at: pass evals=[(what, name)]")
    training = Supervised(
        client=client,
        loop=loop,
        matrix=matrix,
        evals=_evals(client, evals or (), X, matrix, given),
        places=Places(workers, n_workers, resources, timeout),
        exclusive=exclusive,
        keeping=_keeping(settings, checkpoint, checkpoint_every, max_restarts),
        max_restarts=max_restarts,
        listeners=listeners_of(verbose_eval, listen, progress, recorder),
    )
    training.prepare()
    return clients.call(client, reported, recorder, training.run, evals_result)


def listeners_of(
    verbose_eval: bool | int | None, listen: Listener | None, progress: bool | None, recorder: Recorder | None
) -> list[Any]:
    """Who hears the events of a training."""
    there: list[Any] = [RoundPrinter(verbose_eval)] if verbose_eval else []
    if listen is not None:
        there.append(listen)
    if wants_bar(progress):
        there.append(ProgressBar("XGBoost"))
    if recorder is not None:
        there.append(recorder)
    return there


def settings_of(params: Mapping[str, Any] | Sequence[tuple[str, Any]], max_bin: int | None) -> dict[str, Any]:
    """Parameters as a dict, as XGBoost reads them."""
    settings = dict(params)
    if isinstance(params, Sequence) and len(settings) < len(params):
        settings["eval_metric"] = [value for name, value in params if name == "eval_metric"]
    settings = {name: value for name, value in settings.items() if value is not None}
    return settings if max_bin is None else {**settings, "max_bin": max_bin}


def _unkept(params: Mapping[str, Any]) -> str | None:
    """The parameter for which a booster between two rounds is not all that XGBoost goes on from."""
    if params.get("process_type") == "update":
        return "process_type='update'"
    unbiased = str(params.get("lambdarank_unbiased", "")).lower() in ("true", "1")
    return "lambdarank_unbiased" if unbiased else None


def _keeping(
    params: Mapping[str, Any], checkpoint: str | Path | Checkpoints | None, every: int, max_restarts: int
) -> Keeping | None:
    for name, value, least in (("checkpoint_every", every, 1), ("max_restarts", max_restarts, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number from {least}")
    if parameter := _unkept(params):
        if checkpoint is not None:
            raise ValueError(
                f"{parameter} has state in XGBoost of which no checkpoint can be kept: leave checkpoint out"
            )
        return None
    if checkpoint is not None:
        return Keeping(resuming.at(checkpoint))
    return Keeping(None) if max_restarts else None


def matrix_of(client: Client, X: Any, fields: dict[str, Any], options: MatrixOptions, role: str) -> DMatrix:
    """The matrix that is given, or that of collections."""
    if isinstance(X, DMatrix):
        extra = [name for name, value in fields.items() if value is not None]
        if extra:
            raise DataError(f"{role} is a DMatrix, which has its own fields: pass {extra} when it is made")
        return X
    return known.matrix(client, X, fields, options, role)


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
        other = matrix_of(client, what, {} if isinstance(what, DMatrix) else dict(fields), options, role)
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


def checked_callbacks(callbacks: Sequence[Any] | None) -> tuple[Any, ...]:
    """Callbacks, if they are."""
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
