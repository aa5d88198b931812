"""XGBoost's scikit-learn estimators, trained on the cluster: Dask collections, numpy and pandas alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import xgboost as xgb
from distributed import Client

from dask_xgboost.classifying import Classifier
from dask_xgboost.fitting import Forest, OfNumbers, Regressor
from dask_xgboost.places import Places
from dask_xgboost.sets import Rows, split_qid, with_groups
from dask_xgboost.steps import Steps

__all__ = ["XGBClassifier", "XGBRFClassifier", "XGBRFRegressor", "XGBRanker", "XGBRegressor"]


class XGBClassifier(Classifier, xgb.XGBClassifier):  # type: ignore[misc]
    """`xgboost.XGBClassifier` for Dask collections, numpy and pandas, with labels of any kind.

    Parameters
    ----------
    **params
        Those of `xgboost.XGBClassifier`. A negative `n_jobs`, or none, stands for all threads of each worker.
    client : distributed.Client, optional
        Whom to train with, by default the current one; also a property. No hyper-parameter: clones and pickles have
        none.

    Attributes
    ----------
    classes_ : ndarray
        The labels, sorted. Files of the model keep them if they are numbers, strings, booleans or dates.

    Examples
    --------
    >>> from distributed import Client
    >>> import dask.array as da, numpy as np
    >>> client = Client(processes=False, dashboard_address=None)
    >>> X = da.random.random((1000, 3), chunks=(250, 3))
    >>> y = da.where(X[:, 0] > 0.5, "late", "on time")
    >>> model = XGBClassifier(n_estimators=3).fit(X, y)
    >>> model.classes_
    array(['late', 'on time'], dtype='<U7')
    >>> model.predict(X).chunks
    ((250, 250, 250, 250),)
    >>> client.close()
    """

    _plain = xgb.XGBClassifier


class XGBRegressor(Regressor, xgb.XGBRegressor):  # type: ignore[misc]
    """`xgboost.XGBRegressor` for Dask collections, numpy and pandas.

    Parameters
    ----------
    **params
        Those of `xgboost.XGBRegressor`; see `XGBClassifier` for `n_jobs` and `client`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> XGBRegressor(n_estimators=3).fit(X, X[:, 0]).predict(X).shape     # without a client: here
    (100,)
    """

    _plain = xgb.XGBRegressor


class XGBRFClassifier(Classifier, Forest, xgb.XGBRFClassifier):  # type: ignore[misc]
    """`xgboost.XGBRFClassifier`, a random forest, for Dask collections, numpy and pandas; see `XGBClassifier`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> XGBRFClassifier(n_estimators=3).fit(X, np.where(X[:, 0] > 0.5, "late", "on time")).predict(X[:1]).shape
    (1,)
    """

    _plain = xgb.XGBRFClassifier


class XGBRFRegressor(Regressor, Forest, xgb.XGBRFRegressor):  # type: ignore[misc]
    """`xgboost.XGBRFRegressor`, a random forest, for Dask collections, numpy and pandas; see `XGBRegressor`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> XGBRFRegressor(n_estimators=3).fit(X, X[:, 0]).get_booster().num_boosted_rounds()
    1
    """

    _plain = xgb.XGBRFRegressor


class XGBRanker(OfNumbers, xgb.XGBRanker):  # type: ignore[misc]
    """`xgboost.XGBRanker` for Dask collections, numpy and pandas.

    Parameters
    ----------
    **params
        Those of `xgboost.XGBRanker`; see `XGBClassifier` for `n_jobs` and `client`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> model = XGBRanker(n_estimators=3).fit(X, (X[:, 0] * 3).astype(int), qid=np.repeat(np.arange(10), 10))
    >>> model.predict(X).shape
    (100,)
    """

    _plain = xgb.XGBRanker

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        group: Any = None,
        qid: Any = None,
        sample_weight: Any = None,
        base_margin: Any = None,
        eval_set: Sequence[tuple[Any, Any]] | None = None,
        eval_group: Sequence[Any] | None = None,
        eval_qid: Sequence[Any] | None = None,
        verbose: bool | int | None = False,
        xgb_model: Any = None,
        sample_weight_eval_set: Sequence[Any] | None = None,
        base_margin_eval_set: Sequence[Any] | None = None,
        feature_weights: Any = None,
        workers: Sequence[str] | None = None,
        n_workers: int | None = None,
        resources: Mapping[str, float] | None = None,
        timeout: float | str | None = None,
    ) -> Any:
        """Train, on the cluster where there is one.

        The keywords are those of `xgboost.XGBRanker.fit`, and those of `XGBClassifier.fit` that say where. Query groups
        that partitions cut are brought together. `qid` may be the column ``"qid"`` of a dataframe instead. In memory,
        `sample_weight` has one entry a group, as in XGBoost, and `group` may be given instead of `qid`. For
        collections it has one a row, of which the group's first counts.

        Raises
        ------
        DataError
            If there is neither `qid` nor `group`. It is a ValueError.
        """
        given = {
            "sample_weight": sample_weight,
            "base_margin": base_margin,
            "eval_set": eval_set,
            "sample_weight_eval_set": sample_weight_eval_set,
            "base_margin_eval_set": base_margin_eval_set,
            "group": group,
            "qid": qid,
            "eval_group": eval_group,
            "eval_qid": eval_qid,
        }
        settings = {"verbose": verbose, "xgb_model": xgb_model, "feature_weights": feature_weights}
        return self._fit(X, y, given, settings, Places(workers, n_workers, resources, timeout))

    def _check(self, rows: Rows) -> None:
        super()._check(dataclasses.replace(rows, weight=None))

    def _coded(self, client: Client, sets: list[Rows]) -> Steps:
        whole = {id(rows): with_groups(rows) for rows in sets}
        yield from ()
        return [whole[id(rows)] for rows in sets], None

    def predict(self, X: Any, **keywords: Any) -> Any:
        """Predict relevance, lazily for collections; a column ``"qid"`` is left out."""
        return super().predict(split_qid(X)[0], **keywords)

    def apply(self, X: Any, iteration_range: tuple[int, int] | None = None) -> Any:
        """The leaf of each tree that each row comes to; lazily for collections."""
        return super().apply(split_qid(X)[0], iteration_range)

    def score(self, X: Any, y: Any) -> Any:
        """The last metric, of rows in memory."""
        if dask.is_dask_collection(X):
            raise TypeError(
                "score of a ranker takes data in memory; for collections, give them to fit as eval_set with eval_qid, "
                "and look at evals_result()"
            )
        return super().score(X, y)
