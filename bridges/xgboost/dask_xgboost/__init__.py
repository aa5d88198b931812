"""XGBoost on Dask: plain boosters, trained by a gang of workers on the partitions they hold.

>>> import dask_xgboost
>>> booster = dask_xgboost.train(client, {"objective": "binary:logistic"}, df, "late")  # doctest: +SKIP
>>> dask_xgboost.predict(client, booster, df[booster.feature_names])                    # doctest: +SKIP
>>> dask_xgboost.XGBClassifier(n_estimators=50).fit(X, y).predict_proba(X)              # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_xgboost.crossvalidation import cv
    from dask_xgboost.dmatrix import DMatrix
    from dask_xgboost.estimators import XGBClassifier, XGBRanker, XGBRegressor, XGBRFClassifier, XGBRFRegressor
    from dask_xgboost.metrics import gathered
    from dask_xgboost.prediction import predict
    from dask_xgboost.training import train

__all__ = [
    "DMatrix",
    "XGBClassifier",
    "XGBRFClassifier",
    "XGBRFRegressor",
    "XGBRanker",
    "XGBRegressor",
    "cv",
    "gathered",
    "predict",
    "train",
]

_HOMES = {
    "DMatrix": "dmatrix",
    "cv": "crossvalidation",
    "XGBClassifier": "estimators",
    "XGBRFClassifier": "estimators",
    "XGBRFRegressor": "estimators",
    "XGBRanker": "estimators",
    "XGBRegressor": "estimators",
    "gathered": "metrics",
    "predict": "prediction",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: importing the package alone loads neither xgboost nor dask.dataframe."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dask_xgboost.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
