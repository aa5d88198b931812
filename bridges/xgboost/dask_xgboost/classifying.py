"""What XGBoost's classifiers get for Dask: labels of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import dask
import numpy as np
from distributed import Client

from dask_xgboost import labels, scores
from dask_xgboost.fitting import OnCluster
from dask_xgboost.sets import Rows, sets_of
from dask_xgboost.steps import Steps, compute, run

__all__ = ["Classifier"]


class Classifier(OnCluster):
    """Labels of any kind are coded for XGBoost and given back by `predict`."""

    objective: Any
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
        coded, classes = run(self._coded(None, sets_of(X, y, given)), None)
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
            return values.astype("int64") if values.ndim > 1 else self.classes_[np.minimum(values, self.n_classes_ - 1)]
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


def _for_classes(objective: Any, classes: Any) -> Any:
    """An objective for so many classes: the switch XGBoost makes, and back when an estimator is fitted again."""
    if len(classes) > 2:
        return objective if objective == "multi:softmax" else "multi:softprob"
    return "binary:logistic" if str(objective).startswith("multi:") else objective
