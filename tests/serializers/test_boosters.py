"""Boosters, and scikit-learn estimators that hold one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost
from dask.sizeof import sizeof
from distributed.protocol import deserialize, dumps, loads, serialize, to_serialize


def move(obj: Any) -> Any:
    frames = [bytes(frame) for frame in dumps({"x": to_serialize(obj)}, frame_split_size=2**26)]
    return loads([memoryview(bytearray(frame)) for frame in frames])["x"]


@pytest.fixture(scope="module")
def rows() -> tuple[pd.DataFrame, Any]:
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"a": random.normal(size=300), "b": random.normal(size=300)})
    frame["c"] = pd.Categorical(random.choice(["x", "y", "z"], size=300))
    return frame, (frame["a"] + (frame["c"] == "x") > 0.5).astype(int)


@pytest.fixture(scope="module")
def booster(rows: tuple[pd.DataFrame, Any]) -> Any:
    matrix = xgboost.DMatrix(*rows, enable_categorical=True)
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 3, "eta": 0.2, "eval_metric": "auc"},
        matrix, 40, evals=[(matrix, "m")], early_stopping_rounds=5, verbose_eval=False,
    )  # fmt: skip
    booster.set_attr(note="kept")
    return booster


def test_a_booster_arrives_whole(booster: Any, rows: tuple[pd.DataFrame, Any]) -> None:
    assert serialize(booster)[0]["serializer"] == "dask"
    moved = move(booster)
    matrix = xgboost.DMatrix(*rows, enable_categorical=True)
    np.testing.assert_array_equal(moved.predict(matrix), booster.predict(matrix))
    assert moved.attributes() == booster.attributes()
    assert (moved.best_iteration, moved.best_score) == (booster.best_iteration, booster.best_score)
    assert (moved.feature_names, moved.feature_types) == (booster.feature_names, booster.feature_types)
    assert (
        moved.get_categories(export_to_arrow=True).to_arrow() == booster.get_categories(export_to_arrow=True).to_arrow()
    )
    assert moved.save_config() == booster.save_config()
    assert moved.save_raw("ubj") == booster.save_raw("ubj")


def test_training_goes_on_from_a_moved_booster(booster: Any, rows: tuple[pd.DataFrame, Any]) -> None:
    matrix = xgboost.DMatrix(*rows, enable_categorical=True)
    params = {"objective": "binary:logistic", "max_depth": 3}
    here, there = (xgboost.train(params, matrix, 5, xgb_model=each) for each in (booster, move(booster)))
    assert here.save_raw("ubj") == there.save_raw("ubj")


def test_a_booster_that_has_seen_no_data_says_that_it_cannot_move() -> None:
    from dask_serializers import CannotMove

    with pytest.raises(CannotMove, match=r"Booster cannot be moved.*feature"):  # XGBoost cannot save it either
        move(xgboost.Booster({"max_depth": 3})).predict  # noqa: B018


def test_an_estimator_arrives_with_its_booster(rows: tuple[pd.DataFrame, Any]) -> None:
    frame, label = rows
    estimator = xgboost.XGBClassifier(n_estimators=7, enable_categorical=True).fit(frame, label)
    moved = move(estimator)
    np.testing.assert_array_equal(moved.predict_proba(frame), estimator.predict_proba(frame))
    assert sizeof(estimator) > 0.5 * len(estimator.get_booster().save_raw("ubj"))
    assert repr(moved.get_params()) == repr(estimator.get_params())
    assert not hasattr(move(xgboost.XGBRegressor(max_depth=2)), "_Booster")


def test_a_booster_that_cannot_be_read_is_a_stand_in(booster: Any) -> None:
    from dask_serializers import CannotMove

    header, frames = serialize(booster)
    frames[1] = bytes(10) + bytes(frames[1])[10:]
    with pytest.raises(CannotMove, match="kind 'xgboost' cannot be rebuilt"):
        deserialize(header, frames).predict  # noqa: B018


def test_dask_knows_what_a_booster_weighs(booster: Any) -> None:
    true = len(booster.save_raw("ubj"))
    assert 0.5 * true < sizeof(booster) < 2 * true
    assert sizeof(xgboost.Booster()) < 10_000
