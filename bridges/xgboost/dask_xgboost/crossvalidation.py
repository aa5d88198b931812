"""`cv`: the client's side of a cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xgboost as xgb
from distributed import Client

from dask_bridges import clients, config, placement
from dask_bridges.events import Listener
from dask_bridges.ports import port_range
from dask_bridges.reporting import asked, reported
from dask_xgboost import checks
from dask_xgboost.dealing import Asked
from dask_xgboost.definition import label_of
from dask_xgboost.matrixspec import MatrixOptions
from dask_xgboost.places import Places
from dask_xgboost.rank import Loop
from dask_xgboost.supervising import Supervised
from dask_xgboost.training import checked_callbacks, listeners_of, matrix_of, settings_of

__all__ = ["cv"]


def cv(
    client: Client | None,
    params: Mapping[str, Any] | Sequence[Any],
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
    nfold: int = 3,
    stratified: bool = False,
    folds: Any = None,
    metrics: str | Sequence[str] = (),
    obj: Callable[..., Any] | None = None,
    custom_metric: Callable[..., Any] | None = None,
    maximize: bool | None = None,
    early_stopping_rounds: int | None = None,
    as_pandas: bool = True,
    verbose_eval: bool | int | None = None,
    seed: int = 0,
    callbacks: Sequence[xgb.callback.TrainingCallback] | None = None,
    shuffle: bool = True,
    missing: float = float("nan"),
    enable_categorical: bool = True,
    max_bin: int | None = None,
    cuts: str = "auto",
    workers: Sequence[str] | None = None,
    n_workers: int | None = None,
    resources: Mapping[str, float] | None = None,
    progress: bool | None = None,
    listen: Listener | None = None,
    report: str | Path | None = None,
    max_restarts: int = 3,
    exclusive: bool = True,
    timeout: float | str | None = None,
    allow_plaintext: bool | None = None,
    tracker_host: str | None = None,
    tracker_port: int | str | tuple[int, int] | None = None,
) -> Any:
    """Cross-validate on a Dask cluster; the keywords and the result are those of `xgboost.cv`.

    The rows are binned once, and where they are: folds are marks on rows, no row is copied or sent. Boosters of all
    folds go on side by side, and what is binned stays for the next call, as with `train`.

    Parameters
    ----------
    client : distributed.Client or None
        None for the current one. With an asynchronous client the result is awaitable.
    params : mapping, or sequence of mapping
        XGBoost's parameters; a sequence of sets of them is evaluated one after the other, on the same matrix and the
        same folds.
    X, y, label, weight, base_margin, qid, label_lower_bound, label_upper_bound : optional
        See `train`. With `qid`, folds are of whole query groups; the objective is one of ``rank:``, and metrics are
        ``ndcg``, ``map``, ``pre`` and functions.
    feature_weights, feature_names, feature_types, missing, enable_categorical, max_bin, cuts : optional
        See `train`. The cuts are those of all rows, where `xgboost.cv` finds them for each fold.
    num_boost_round : int, default 10
    nfold : int, default 3
        Number of folds. Rows (or query groups) are dealt out within each partition, and do not depend on where it
        lies.
    stratified : bool, default False
        Whether the rows of each label are dealt out evenly, as far as they are in the same partition.
    folds : sequence of (train, test), or a scikit-learn splitter, optional
        Positions of rows, counted over all partitions in order; or what makes them, such as
        `sklearn.model_selection.TimeSeriesSplit`, for which the labels are brought to the client. With `qid` they are
        ids of query groups, and a splitter divides these, in order.
    metrics : str or sequence of str, optional
        In place of ``params["eval_metric"]``.
    obj, custom_metric, maximize, early_stopping_rounds : optional
        See `train`. Early stopping looks at the mean over the folds.
    as_pandas : bool, default True
        Whether results are data frames, and not dicts of lists.
    verbose_eval : bool or int, optional
        Print the metrics here, every round or every n-th.
    seed : int, default 0
        Of the folds.
    callbacks : sequence of xgboost.callback.TrainingCallback, optional
        Run on every worker, a copy for each set of parameters.
    shuffle : bool, default True
        Whether rows are dealt out at random. Without, folds are runs of consecutive rows.
    workers, n_workers, resources, progress, listen, report, exclusive, timeout, allow_plaintext : optional
        See `train`.
    max_restarts : int, default 3
        How often it is started again when workers are lost; it begins anew.
    tracker_host, tracker_port : optional
        See `train`.

    Returns
    -------
    pandas.DataFrame or dict of list
        Columns ``train-logloss-mean``, ``train-logloss-std``, ``test-logloss-mean`` and so on, a row a round; with
        early stopping up to the best one. A list of them for a sequence of sets of parameters.

    Raises
    ------
    DataError
        If the data cannot be trained on, or folds do not fit them.
    PlacementError, GangTimeout, MemberFailed, MemberLost, ValueError
        See `train`.

    Examples
    --------
    >>> from distributed import Client
    >>> import dask.array as da, dask_xgboost
    >>> client = Client(processes=False, dashboard_address=None)
    >>> X = da.random.random((1000, 3), chunks=(250, 3))
    >>> result = dask_xgboost.cv(client, {"max_depth": 2}, X, X[:, 0] * 2, num_boost_round=4)
    >>> result.shape
    (4, 4)
    >>> many = dask_xgboost.cv(client, [{"max_depth": depth} for depth in (1, 2)], X, X[:, 0] * 2)
    >>> len(many)
    2
    >>> client.close()
    """
    client = clients.current(client)
    recorder = asked(report)
    several = not isinstance(params, Mapping) and all(isinstance(each, Mapping) for each in params)
    each_set: Any = params if several else [params]
    sets = [settings_of(each, max_bin) for each in each_set]
    _check(sets, cuts)
    if metrics:
        sets = [{**each, "eval_metric": [metrics] if isinstance(metrics, str) else list(metrics)} for each in sets]
    placement.refuse_plaintext(client, allow_plaintext, "XGBoost's tracker and collective traffic")
    given = {"label": label_of(y, label), "weight": weight, "base_margin": base_margin, "qid": qid,
             "label_lower_bound": label_lower_bound, "label_upper_bound": label_upper_bound}  # fmt: skip
    options = MatrixOptions(feature_weights, feature_names, feature_types, missing, enable_categorical)
    matrix = matrix_of(client, X, given, options, "X")
    loop = Loop(
        params=sets[0],
        num_boost_round=num_boost_round,
        obj=obj,
        custom_metric=custom_metric,
        early_stopping_rounds=early_stopping_rounds,
        maximize=maximize,
        callbacks=checked_callbacks(callbacks),
        tracker_host=config.get("xgboost.tracker-host", tracker_host),
        tracker_port=config.get("xgboost.tracker-port", tracker_port),
        config=xgb.get_config(),
        cuts=cuts,
    )
    port_range(loop.tracker_port, "tracker_port")
    training = Supervised(
        client=client,
        loop=loop,
        matrix=matrix,
        evals=[],
        places=Places(workers, n_workers, resources, timeout),
        exclusive=exclusive,
        keeping=None,
        max_restarts=max_restarts,
        listeners=listeners_of(verbose_eval, listen, progress, recorder),
        folds=Asked(sets, nfold, stratified, folds, shuffle, seed),
    )
    training.prepare()

    async def run() -> Any:
        found = await training.run(None)
        if as_pandas:
            import pandas as pd

            found = [pd.DataFrame(each) for each in found]
        return found if several else found[0]

    return clients.call(client, reported, recorder, run)


def _check(sets: Sequence[dict[str, Any]], cuts: str) -> None:
    if not sets:
        raise ValueError("params is an empty sequence: give a mapping, or some")
    for each in sets:
        checks.check_params(each)
    if len({each.get("max_bin") for each in sets}) > 1:
        raise ValueError("the sets of params have different max_bin: they share one matrix. Call cv for each max_bin")
    checks.check_cuts(cuts)
