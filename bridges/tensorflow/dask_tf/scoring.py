"""In the scorer's process: the newest weights are evaluated as they come."""

from __future__ import annotations

import pickle
from typing import Any

from dask_tf import here
from dask_tf.chief import Source

__all__ = ["prepare", "score"]

_model: Any = None
_source: Source | None = None


def prepare(model: bytes, source: Source) -> None:
    """Get ready to evaluate a pickled model on a feed."""
    global _model, _source
    _model, _source = pickle.loads(model), source


def score(newest: tuple[int, list[Any]] | None) -> tuple[int, dict[str, float]] | None:
    """Steps and scores of these weights; None if there are none any more."""
    from dask_tf.training import evaluate

    if newest is None:
        return None
    if _source is None:
        raise RuntimeError("this scorer has no model: it was started again")
    step, weights = newest
    if not weights:
        return step, {}
    return step, evaluate(_model, weights, _source.dataset(here.current()))
