"""XGBoost's scikit-learn estimators, trained on the cluster: Dask collections, numpy and pandas alike.

Each is a subclass of XGBoost's own, of which these names that are not public are used: ``_Booster``,
``_configure_fit``, ``_get_iteration_range``, ``_set_evaluation_result``, and ``_objective_decorator`` and
``_check_rf_callback`` of `xgboost.sklearn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import xgboost as xgb
from distributed import Client
from xgboost import sklearn as upstream

from dask_bridges import clients
from dask_bridges.errors import DataError
from dask_xgboost import labels, prediction, scores
from dask_xgboost.dmatrix import DMatrix, MatrixOptions
from dask_xgboost.inmemory import Rows, next_turn, on_workers
from dask_xgboost.steps import Steps, compute, run
from dask_xgboost.training import train

__all__ = ["XGBClassifier", "XGBRFClassifier", "XGBRFRegressor", "XGBRanker", "XGBRegressor"]


class _OnCluster(xgb.XGBModel):  # type: ignore[misc]
    """What all estimators share: where `fit` runs, and predictions of collections."""

    _plain: type[Any]
    _client: Client | None = None

    def __init__(self, **params: Any) -> None:
        client = params.pop("client", None)
        super().__init__(**params)
        if client is not None:
            self.client = client

    @property
    def client(self) -> Client | None:
        """The client to train with; None for the current one. No hyper-parameter: clones and pickles have none."""
        return self._client

    @client.setter
    def client(self, client: Client | None) -> None:
        self._client = None if client is None else clients.current(client)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_client"}

    def to_xgboost(self) -> Any:
        """The same estimator, fitted or not, as XGBoost's own class, for where this package is not installed.

        XGBoost's classifiers know no classes but 0, 1, 2, ...: theirs are the places of the labels in `classes_`.
        """
        plain = self._plain.__new__(self._plain)
        plain.__dict__.update({name: value for name, value in vars(self).items() if name not in _OURS})
        return _with_own_booster(plain)

    @classmethod
    def from_xgboost(cls, model: Any) -> Any:
        """An estimator of XGBoost's own class, fitted or not, as this one; classes come back from `to_xgboost`."""
        if not isinstance(model, cls._plain):
            raise TypeError(f"{cls.__name__}.from_xgboost takes an xgboost.{cls._plain.__name__}, not {model!r}")
        ours = cls.__new__(cls)
        ours.__dict__.update({name: value for name, value in vars(model).items() if name not in _OURS})
        return _with_own_booster(ours)

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        base_margin: Any = None,
        eval_set: Sequence[tuple[Any, Any]] | None = None,
        verbose: bool | int | None = True,
        xgb_model: Any = None,
        sample_weight_eval_set: Sequence[Any] | None = None,
        base_margin_eval_set: Sequence[Any] | None = None,
        feature_weights: Any = None,
    ) -> Any:
        """Train, on the cluster where there is one.

        Parameters
        ----------
        X : dask array or dataframe, array_like, pandas dataframe or scipy.sparse matrix
            Shape (rows, features).
        y, sample_weight, base_margin : dask array or series, or array_like, optional
            As many rows as `X`; Dask collections where `X` is one.
        eval_set : sequence of tuple, optional
            Of ``(X, y)``: Dask collections or in memory, each for itself. The last one counts for early stopping.
        verbose : bool or int, default True
            Print the metrics of `eval_set`, every round or every n-th.
        xgb_model : Booster, estimator or path, optional
            A model to go on from.
        sample_weight_eval_set, base_margin_eval_set : sequence, optional
            One a set of `eval_set`.
        feature_weights : array_like, optional
            Deprecated by XGBoost: give it when the estimator is made.

        Returns
        -------
        self
            With an asynchronous client, an awaitable of it.

        Raises
        ------
        DataError
            If the data cannot be trained on. It is a ValueError.
        """
        given = {
            "sample_weight": sample_weight,
            "base_margin": base_margin,
            "eval_set": eval_set,
            "sample_weight_eval_set": sample_weight_eval_set,
            "base_margin_eval_set": base_margin_eval_set,
        }
        return self._fit(X, y, given, {"verbose": verbose, "xgb_model": xgb_model, "feature_weights": feature_weights})

    def _fit(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        if y is None:
            raise DataError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if isinstance(y, str):
            raise DataError(f"y={y!r} is a name: pass the column, such as df[{y!r}], and X without it")
        sets = _sets(X, y, given)
        client = self._trainer(sets)
        if client is None:
            return self._fit_here(X, y, given, settings)
        return run(self._fit_there(client, sets, **settings), client)

    def _trainer(self, sets: Sequence[Rows]) -> Client | None:
        """The client to train with; None to train here: where there is none, or in a task with rows in memory."""
        if self._client is not None or any(rows.lazy() for rows in sets):
            return clients.current(self._client)
        return None if clients.in_task() else _current()

    def _fit_here(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        return super().fit(X, y, **given, **settings)

    def _fit_there(
        self, client: Client, sets: list[Rows], verbose: Any, xgb_model: Any, feature_weights: Any
    ) -> Steps:
        """Train on the cluster."""
        coded, classes = yield from self._coded(client, sets)
        params = self._training_params(classes)
        model, metric, params, feature_weights = self._configure_fit(xgb_model, params, feature_weights)
        matrices = yield from self._matrices(client, coded, feature_weights)
        history: dict[str, Any] = {}
        booster = yield train(
            client,
            {name: value for name, value in params.items() if value is not None},
            matrices[0],
            num_boost_round=self.get_num_boosting_rounds(),
            evals=[(matrix, f"validation_{number}") for number, matrix in enumerate(matrices[1:])],
            evals_result=history,
            obj=upstream._objective_decorator(self.objective) if callable(self.objective) else None,
            custom_metric=metric,
            early_stopping_rounds=self.early_stopping_rounds,
            callbacks=self.callbacks,
            xgb_model=model,
            verbose_eval=verbose or False,
        )
        self._Booster = booster
        self._set_evaluation_result(history)
        self._trained(params, classes)
        return self

    def _coded(self, client: Client, sets: list[Rows]) -> Steps:
        """The sets with numbers for labels; and the classes, None if labels are no classes."""
        for rows in sets:
            dtype = getattr(rows.label if hasattr(rows.label, "dtype") else np.asarray(rows.label), "dtype", None)
            if isinstance(dtype, np.dtype) and dtype.kind not in "biufO":
                raise DataError(f"{rows.name('label')} has dtype {dtype}, and numbers are wanted")
        return [rows if rows.lazy() else _numeric(rows) for rows in sets], None
        yield

    def _training_params(self, classes: Any) -> dict[str, Any]:
        """XGBoost's parameters. Any number of threads below one stands for all of the worker's."""
        params: dict[str, Any] = self.get_xgb_params()
        if params.get("n_jobs") is not None and params["n_jobs"] < 1:
            del params["n_jobs"]
        if callable(self.objective):
            params["objective"] = "reg:squarederror"
        return params

    def _matrices(self, client: Client, sets: list[Rows], feature_weights: Any) -> Steps:
        """A matrix for each set, in order; one for the same set."""
        turn, made = next_turn(), {}
        for rows in sets:
            if id(rows) in made:
                continue
            placed = yield from on_workers(client, rows, turn)
            options = MatrixOptions(
                feature_weights=None if rows.role else feature_weights,
                feature_types=None if hasattr(placed.X, "columns") else self.feature_types,
                missing=self.missing,
                enable_categorical=self.enable_categorical,
            )
            made[id(rows)] = DMatrix.unplaced(client, placed.X, placed.fields, options, rows.role or "X")
        return [made[id(rows)] for rows in sets]

    def _trained(self, params: Mapping[str, Any], classes: Any) -> None:
        """Take note of what training has settled."""

    def _lazily(self, X: Any, iteration_range: Any = None, **keywords: Any) -> Any:
        return prediction.predict(
            None,
            self.get_booster(),
            X,
            missing=self.missing,
            iteration_range=self._get_iteration_range(iteration_range),
            **keywords,
        )

    def predict(
        self,
        X: Any,
        *,
        output_margin: bool = False,
        validate_features: bool = True,
        base_margin: Any = None,
        iteration_range: tuple[int, int] | None = None,
    ) -> Any:
        """Predict: collections lazily, with their partitions and index; what is in memory at once, as XGBoost does."""
        keywords: dict[str, Any] = {"validate_features": validate_features, "base_margin": base_margin}
        if dask.is_dask_collection(X):
            return self._lazily(X, iteration_range, output_margin=output_margin, **keywords)
        return super().predict(X, output_margin=output_margin, iteration_range=iteration_range, **keywords)

    def apply(self, X: Any, iteration_range: tuple[int, int] | None = None) -> Any:
        """The leaf of each tree that each row comes to, shape (rows, trees); lazily for collections."""
        if dask.is_dask_collection(X):
            return self._lazily(X, iteration_range, pred_leaf=True)
        return super().apply(X, iteration_range)

    def _score(self, function: Any, X: Any, y: Any, sample_weight: Any) -> Any:
        """A score of collections; with an asynchronous client, an awaitable."""
        client = self._client or _current()
        return run(function(client, self.predict(X), y, sample_weight), client)


class _Regressor(_OnCluster):
    """Targets are numbers."""

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """The coefficient of determination; of collections it is counted partition by partition."""
        if dask.is_dask_collection(X):
            return self._score(scores.r2, X, y, sample_weight)
        return super().score(X, y, sample_weight)


class _Classifier(_OnCluster):
    """Labels of any kind are coded for XGBoost and given back by `predict`."""

    _classes: Any = None

    @property
    def classes_(self) -> Any:
        """The labels, sorted."""
        return np.arange(self.n_classes_) if self._classes is None else self._classes

    def _coded(self, client: Client | None, sets: list[Rows]) -> Steps:
        """Look at the labels where they are, all collections in one graph; then code them."""
        unique = list({id(rows): rows for rows in sets}.values())
        looks = [labels.look_lazily(rows.label) if rows.lazy() else [] for rows in unique]
        found = (yield compute(client, [look for some in looks for look in some])) if any(looks) else []
        seen = []
        for rows, some in zip(unique, looks):
            mine, found = (found[: len(some)], found[len(some) :]) if some else ([labels.look(rows.label)], found)
            seen.append(labels.union(rows.name("label"), mine))
        for rows, classes in zip(unique[1:], seen[1:]):
            labels.check_seen(rows.name("label"), seen[0], classes)
        coded = {
            id(rows): dataclasses.replace(rows, label=labels.encoded(seen[0], rows.label)) for rows in unique
        }  # fmt: skip
        return [coded[id(rows)] for rows in sets], seen[0]

    def _fit_here(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        coded, classes = run(self._coded(None, _sets(X, y, given)), None)
        if coded[1:]:
            given = {**given, "eval_set": [(rows.X, rows.label) for rows in coded[1:]]}
        self._classes = None
        if not callable(self.objective):
            self.objective = _for_classes(self.objective, classes)
        super()._fit_here(X, coded[0].label, given, settings)
        self._remember(classes)
        return self

    def _training_params(self, classes: Any) -> dict[str, Any]:
        params = super()._training_params(classes)
        params["objective"] = "binary:logistic" if callable(self.objective) else self.objective
        params["objective"] = _for_classes(params["objective"], classes)
        if len(classes) > 2:
            params["num_class"] = len(classes)
        return params

    def _trained(self, params: Mapping[str, Any], classes: Any) -> None:
        self.n_classes_ = len(classes)
        if not callable(self.objective):
            self.objective = params["objective"]
        self._remember(classes)

    def _remember(self, classes: Any) -> None:
        """Keep the classes, with the booster too, whose files then have them."""
        self._classes = classes
        labels.write(self.get_booster(), classes)

    def load_model(self, fname: Any) -> None:
        """Load a model, with its classes where they were saved by this class."""
        super().load_model(fname)
        self._classes = labels.read(self.get_booster())

    @classmethod
    def from_xgboost(cls, model: Any) -> Any:
        """An estimator of XGBoost's own class, fitted or not, as this one; classes come back from `to_xgboost`."""
        ours = super().from_xgboost(model)
        if ours.__sklearn_is_fitted__():
            ours._classes = labels.read(ours.get_booster())
        return ours

    def predict(
        self,
        X: Any,
        *,
        output_margin: bool = False,
        validate_features: bool = True,
        base_margin: Any = None,
        iteration_range: tuple[int, int] | None = None,
    ) -> Any:
        """The label of each row, or margins; lazily for collections."""
        values = super().predict(
            X,
            output_margin=output_margin,
            validate_features=validate_features,
            base_margin=base_margin,
            iteration_range=iteration_range,
        )
        if output_margin:
            return values
        if not dask.is_dask_collection(X):  # XGBoost has decided
            return values if values.ndim > 1 else self.classes_[np.minimum(values, self.n_classes_ - 1)]
        width = values.shape[1] if values.ndim == 2 and self.n_classes_ == 2 else 0
        return labels.decided(labels.decide, self.classes_, self.objective == "multi:softmax", values, width)

    def predict_proba(
        self,
        X: Any,
        validate_features: bool = True,
        base_margin: Any = None,
        iteration_range: tuple[int, int] | None = None,
    ) -> Any:
        """The probability of each class, shape (rows, classes), in the order of `classes_`; lazily for collections.

        Of a dataframe, a dataframe whose columns are the classes.
        """
        if not dask.is_dask_collection(X):
            return super().predict_proba(X, validate_features, base_margin, iteration_range)
        softmax = self.objective == "multi:softmax"
        values = self._lazily(
            X, iteration_range, validate_features=validate_features, base_margin=base_margin, output_margin=softmax
        )
        width = 2 if values.ndim == 1 else values.shape[1]
        return labels.decided(labels.probabilities, self.classes_, softmax, values, width)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """The share of rows whose label is predicted; of collections it is counted partition by partition."""
        if dask.is_dask_collection(X):
            return self._score(scores.accuracy, X, y, sample_weight)
        return super().score(X, y, sample_weight)


class _Forest(_OnCluster):
    """One round of many trees."""

    def _fit(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        upstream._check_rf_callback(self.early_stopping_rounds, self.callbacks)
        return super()._fit(X, y, given, settings)


class XGBClassifier(_Classifier, xgb.XGBClassifier):  # type: ignore[misc]
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


class XGBRegressor(_Regressor, xgb.XGBRegressor):  # type: ignore[misc]
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


class XGBRFClassifier(_Classifier, _Forest, xgb.XGBRFClassifier):  # type: ignore[misc]
    """`xgboost.XGBRFClassifier`, a random forest, for Dask collections, numpy and pandas; see `XGBClassifier`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> XGBRFClassifier(n_estimators=3).fit(X, np.where(X[:, 0] > 0.5, "late", "on time")).predict(X[:1]).shape
    (1,)
    """

    _plain = xgb.XGBRFClassifier


class XGBRFRegressor(_Regressor, _Forest, xgb.XGBRFRegressor):  # type: ignore[misc]
    """`xgboost.XGBRFRegressor`, a random forest, for Dask collections, numpy and pandas; see `XGBRegressor`.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).random((100, 3))
    >>> XGBRFRegressor(n_estimators=3).fit(X, X[:, 0]).get_booster().num_boosted_rounds()
    1
    """

    _plain = xgb.XGBRFRegressor


class XGBRanker(_OnCluster, xgb.XGBRanker):  # type: ignore[misc]
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
    ) -> Any:
        """Train, on the cluster where there is one; the keywords are those of `xgboost.XGBRanker.fit`.

        A query group lies in one partition. `qid` may be the column ``"qid"`` of a dataframe instead. In memory,
        `sample_weight` has one entry a group, as in XGBoost, and `group` may be given instead of `qid`. For
        collections it has one a row, of which the group's first counts.

        Raises
        ------
        DataError
            If there is neither `qid` nor `group`, or groups are cut by partitions. It is a ValueError.
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
        return self._fit(X, y, given, {"verbose": verbose, "xgb_model": xgb_model, "feature_weights": feature_weights})

    def _coded(self, client: Client, sets: list[Rows]) -> Steps:
        whole = {id(rows): _with_groups(rows) for rows in sets}
        return (yield from super()._coded(client, [whole[id(rows)] for rows in sets]))

    def predict(self, X: Any, **keywords: Any) -> Any:
        """Predict relevance, lazily for collections; a column ``"qid"`` is left out."""
        return super().predict(_split_qid(X)[0], **keywords)

    def apply(self, X: Any, iteration_range: tuple[int, int] | None = None) -> Any:
        """The leaf of each tree that each row comes to; lazily for collections."""
        return super().apply(_split_qid(X)[0], iteration_range)

    def score(self, X: Any, y: Any) -> Any:
        """The last metric, of rows in memory."""
        if dask.is_dask_collection(X):
            raise TypeError(
                "score of a ranker takes data in memory; for collections, give them to fit as eval_set with eval_qid, "
                "and look at evals_result()"
            )
        return super().score(X, y)


#: Attributes that XGBoost's own classes do not have.
_OURS = ("_client", "_classes")


def _with_own_booster(model: Any) -> Any:
    """Two estimators would set each other's parameters."""
    if hasattr(model, "_Booster"):
        model._Booster = model._Booster.copy()
    return model


def _current() -> Client | None:
    try:
        return clients.current(None)
    except ValueError:
        return None


def _for_classes(objective: Any, classes: Any) -> Any:
    """An objective for so many classes: the switch XGBoost makes, and back when an estimator is fitted again."""
    if len(classes) > 2:
        return objective if objective == "multi:softmax" else "multi:softprob"
    return "binary:logistic" if str(objective).startswith("multi:") else objective


def _numeric(rows: Rows) -> Rows:
    """Labels in memory as numbers."""
    values = labels.flat(rows.label)
    if values.dtype.kind == "O":
        try:
            values = values.astype("float64")
        except (TypeError, ValueError) as error:
            raise DataError(f"{rows.name('label')} holds what is no number: {error}") from None
    return dataclasses.replace(rows, label=values)


def _sets(X: Any, y: Any, given: Mapping[str, Any]) -> list[Rows]:
    """The training set and those of `eval_set`; one that is the training set is the same object."""
    first = Rows("", X, y, given["sample_weight"], given["base_margin"], _groups(given.get("qid"), given.get("group")))
    evals = given["eval_set"] or ()
    extra = [
        _one_each(name, given.get(name), given["eval_set"])
        for name in ("sample_weight_eval_set", "base_margin_eval_set", "eval_qid", "eval_group")
    ]
    sets = [first]
    for number, ((eval_X, eval_y), weight, margin, qid, group) in enumerate(zip(evals, *extra)):
        rows = Rows(f"eval_set[{number}]", eval_X, eval_y, weight, margin, _groups(qid, group))
        same = all(
            one is other
            for one, other in zip(
                (eval_X, eval_y, weight, margin, qid, group),
                (X, y, first.weight, first.base_margin, given.get("qid"), given.get("group")),
            )
        )
        sets.append(first if same else rows)
    return sets


def _one_each(name: str, values: Sequence[Any] | None, evals: Sequence[Any] | None) -> Sequence[Any]:
    if values is None:
        return [None] * len(evals or ())
    if len(values) != len(evals or ()):
        raise DataError(f"{name} has {len(values)} entries, and eval_set {len(evals or ())}")
    return values


def _groups(qid: Any, group: Any) -> Any:
    """Query ids; from the sizes of groups where these are given."""
    if group is None:
        return qid
    if dask.is_dask_collection(group):
        raise DataError("group is of no use for collections, whose rows come in partitions: pass qid")
    sizes = np.asarray(group)
    return np.repeat(np.arange(len(sizes)), sizes)


def _split_qid(X: Any) -> tuple[Any, Any]:
    """A frame without its column of query ids, and that column."""
    if "qid" not in getattr(X, "columns", ()):
        return X, None
    return X.drop(columns="qid"), X["qid"]


def _with_groups(rows: Rows) -> Rows:
    """The rows with their query ids; weights of groups in memory become those of their rows."""
    X, column = _split_qid(rows.X)
    if column is not None and rows.qid is not None:
        raise DataError(f"{rows.name('X')} has a column 'qid', and qid is given too: leave one out")
    qid = rows.qid if column is None else column
    if qid is None:
        raise DataError(f"{rows.name('qid')} is missing: a ranking needs the query of each row")
    weight = rows.weight
    if weight is not None and not rows.lazy():
        groups, places = np.unique(np.asarray(qid), return_inverse=True)
        if len(weight) != len(groups):
            raise DataError(f"{rows.name('weight')} has {len(weight)} entries, and there are {len(groups)} query groups")
        weight = np.asarray(weight)[places]
    return dataclasses.replace(rows, X=X, qid=qid, weight=weight)
