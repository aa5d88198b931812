"""What XGBoost's estimators get for Dask: where `fit` runs, and predictions of collections.

Of XGBoost these names that are not public are used: ``_Booster``, ``_configure_fit``, ``_get_iteration_range``,
``_set_evaluation_result``, and ``_objective_decorator`` and ``_check_rf_callback`` of `xgboost.sklearn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import xgboost as xgb
from distributed import Client
from xgboost import sklearn as upstream

from dask_bridges import clients, partitions
from dask_bridges.errors import DataError
from dask_xgboost import labels, prediction, scores
from dask_xgboost.dmatrix import DMatrix
from dask_xgboost.inmemory import next_turn, on_workers
from dask_xgboost.matrixspec import MatrixOptions
from dask_xgboost.metrics import Gathered, on_one_machine
from dask_xgboost.places import Places
from dask_xgboost.sets import Rows, sets_of
from dask_xgboost.steps import Steps, run
from dask_xgboost.training import train

__all__ = ["Forest", "OfNumbers", "OnCluster", "Regressor"]

#: Attributes that XGBoost's own classes do not have.
_OURS = ("_client", "_classes")


class OnCluster(xgb.XGBModel):  # type: ignore[misc]
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
        plain = object.__new__(self._plain)
        plain.__dict__.update({name: value for name, value in vars(self).items() if name not in _OURS})
        return _with_own_booster(plain)

    @classmethod
    def from_xgboost(cls, model: Any) -> Any:
        """An estimator of XGBoost's own class, fitted or not, as this one; classes come back from `to_xgboost`."""
        if not isinstance(model, cls._plain):
            raise TypeError(f"{cls.__name__}.from_xgboost takes an xgboost.{cls._plain.__name__}, not {model!r}")
        ours = object.__new__(cls)
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
        workers: Sequence[str] | None = None,
        n_workers: int | None = None,
        resources: Mapping[str, float] | None = None,
        timeout: float | str | None = None,
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
        workers, n_workers, resources, timeout : optional
            Where on the cluster, and how long to wait for it, as for `dask_xgboost.train`.

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
        settings = {"verbose": verbose, "xgb_model": xgb_model, "feature_weights": feature_weights}
        return self._fit(X, y, given, settings, Places(workers, n_workers, resources, timeout))

    def _fit(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any], places: Places) -> Any:
        if y is None:
            raise DataError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if isinstance(y, str):
            raise DataError(f"y={y!r} is a name: pass the column, such as df[{y!r}], and X without it")
        sets = sets_of(X, y, given)
        for rows in sets:
            self._check(rows)
        client = self._trainer(sets)
        if client is None:
            return self._fit_here(X, y, given, settings)
        return run(self._fit_there(client, sets, places, **settings), client)

    def _check(self, rows: Rows) -> None:
        """Refuse what shows on the client that it cannot be trained on."""
        if not rows.lazy():
            rows.check_lengths()
            weight = np.ones(1) if rows.weight is None else labels.flat(rows.weight)
            if weight.ndim != 1:
                raise DataError(f"{rows.name('weight')} has {weight.ndim} dimensions; one weight a row is wanted")
            if not weight.any():
                raise DataError(f"{rows.name('weight')} is zero for all rows")

    def _trainer(self, sets: Sequence[Rows]) -> Client | None:
        """The client to train with; None to train here: where there is none, or in a task with rows in memory."""
        if self._client is not None or any(rows.lazy() for rows in sets):
            return clients.current(self._client)
        return None if clients.in_task() else _current()

    def _fit_here(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any]) -> Any:
        return super().fit(X, y, **given, **settings)

    def _fit_there(
        self, client: Client, sets: list[Rows], places: Places, verbose: Any, xgb_model: Any, feature_weights: Any
    ) -> Steps:
        """Train on the cluster."""
        coded, classes = yield from self._coded(client, sets)
        params = self._training_params(classes)
        model, metric, params, feature_weights = super()._configure_fit(xgb_model, params, feature_weights)
        given = self.eval_metric if isinstance(self.eval_metric, Sequence) else [self.eval_metric]
        if any(isinstance(one, Gathered) for one in given):  # XGBoost has wrapped it in a function of its own
            metric = Gathered(metric)
        matrices = yield from self._matrices(client, coded, feature_weights, places)
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
            progress=None if sets[0].lazy() else False,
            **vars(places),
        )
        booster.set_param({"nthread": self.n_jobs or 0})  # the threads of here, no longer those of a worker
        self._Booster = booster
        self._set_evaluation_result(history)
        self._trained(params, classes)
        return self

    def _configure_fit(self, *args: Any) -> tuple[Any, Any, Any, Any]:
        """What XGBoost's own `fit` gets, to train here."""
        model, metric, params, feature_weights = super()._configure_fit(*args)
        return model, on_one_machine(metric), params, feature_weights

    def _coded(self, client: Client, sets: list[Rows]) -> Steps:
        """The sets with numbers for labels; and the classes, None if labels are no classes."""
        yield from ()
        return sets, None

    def _training_params(self, classes: Any) -> dict[str, Any]:
        """XGBoost's parameters. Any number of threads below one stands for all of the worker's."""
        params: dict[str, Any] = self.get_xgb_params()
        if params.get("n_jobs") is not None and params["n_jobs"] < 1:
            del params["n_jobs"]
        if callable(self.objective):
            params["objective"] = "reg:squarederror"
        return params

    def _matrices(self, client: Client, sets: list[Rows], feature_weights: Any, places: Places) -> Steps:
        """A matrix for each set, in order; one for the same set."""
        turn, made = next_turn(), {}
        for rows in sets:
            if id(rows) in made:
                continue
            placed = yield from on_workers(client, rows, turn, places)
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


class OfNumbers(OnCluster):
    """Labels are numbers."""

    def _check(self, rows: Rows) -> None:
        super()._check(rows)
        if not rows.lazy():
            try:
                labels.flat(rows.label).astype("float64")
            except (TypeError, ValueError) as error:
                raise DataError(f"{rows.name('label')} holds what is no number: {error}") from None
        elif partitions.is_array(rows.label) and rows.label.dtype.kind not in "biufO":
            raise DataError(f"{rows.name('label')} has dtype {rows.label.dtype}, and numbers are wanted")


class Regressor(OfNumbers):
    """Targets are numbers."""

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """The coefficient of determination; of collections it is counted partition by partition."""
        if dask.is_dask_collection(X):
            return self._score(scores.r2, X, y, sample_weight)
        return super().score(X, y, sample_weight)


class Forest(OnCluster):
    """One round of many trees."""

    def _fit(self, X: Any, y: Any, given: dict[str, Any], settings: dict[str, Any], places: Places) -> Any:
        upstream._check_rf_callback(self.early_stopping_rounds, self.callbacks)
        return super()._fit(X, y, given, settings, places)


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
