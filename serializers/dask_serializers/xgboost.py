"""XGBoost boosters. The scikit-learn wrappers hold one, and pickle themselves well."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost

from dask_serializers.hooks import forget
from dask_serializers.hooks import teach as teach_dispatcher
from dask_serializers.parcel import Parcel, arrive, leave

__all__ = ["rebuild", "size", "teach", "unteach"]

TYPES = (xgboost.Booster,)
SAMPLES = 8


def teach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Let Dask send boosters as XGBoost's own UBJSON."""
    teach_dispatcher(serialize, TYPES, dumps)
    teach_dispatcher(deserialize, TYPES, arrive)
    teach_dispatcher(sizeof, TYPES, size)
    teach_dispatcher(sizeof, (xgboost.XGBModel,), _estimator_size)


def unteach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Undo :func:`teach`."""
    for dispatcher in (serialize, deserialize):
        forget(dispatcher, TYPES)
    forget(sizeof, (*TYPES, xgboost.XGBModel))


def dumps(booster: Any) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of a booster; one of the user's own type goes by pickle."""
    if type(booster) is not xgboost.Booster:
        raise NotImplementedError
    return leave(lambda: take_apart(booster), "Booster")


def take_apart(booster: Any) -> Parcel:
    """Trees, attributes, feature names and categories in one frame; the configuration in the description."""
    model = memoryview(booster.save_raw("ubj"))
    return Parcel(
        kind="xgboost",
        description={"config": booster.save_config()},
        arrays=[("uint8", (len(model),), model)],
        versions={"xgboost": xgboost.__version__},
    )


def rebuild(parcel: Parcel) -> Any:
    """The booster of a parcel."""
    assert parcel.stream is not None
    ((_, (length,)),) = parcel.stream.specs
    model = bytearray(length)
    parcel.stream.read(np.frombuffer(model, np.uint8))
    booster = xgboost.Booster()
    booster.load_model(model)
    booster.load_config(parcel.description["config"])
    return booster


def size(booster: Any) -> int:
    """Bytes of a booster, from a few of its rounds: XGBoost gives its size only with a copy of it."""
    rounds = _rounds(booster)
    if not rounds:
        return 1000
    step = max(1, rounds // SAMPLES)
    sampled = [len(booster[at : at + 1].save_raw("ubj")) for at in range(0, rounds, step)]
    return sum(sampled) * rounds // len(sampled)


def _rounds(booster: Any) -> int:
    try:
        return int(booster.num_boosted_rounds())
    except xgboost.core.XGBoostError:  # it has not seen a feature yet
        return 0


def _estimator_size(estimator: Any) -> int:
    booster = vars(estimator).get("_Booster")
    return 2000 + (size(booster) if booster is not None else 0)
