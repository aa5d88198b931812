"""`predict`: lazy, one layer on the graph; the booster within it, or a node of its own where it is large."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import asdict, dataclass
from typing import Any

import dask
import numpy as np
import xgboost as xgb
from distributed import Client, get_worker

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_bridges.shipping import sealed

__all__ = ["predict"]

#: From so many rows on, another thread saves more than it costs to start.
_ROWS_A_THREAD = 10_000
#: Bytes of a booster, once for each partition, that travel with the tasks: a task
#: of its own and its way to the other workers take longer than to send so many.
_WITH_TASKS = 1 << 22


@dataclass(frozen=True)
class _Options:
    """Keywords of `xgboost.Booster.predict`."""

    output_margin: bool = False
    pred_leaf: bool = False
    pred_contribs: bool = False
    approx_contribs: bool = False
    pred_interactions: bool = False
    validate_features: bool = True
    iteration_range: tuple[int, int] = (0, 0)
    strict_shape: bool = False
    missing: float = float("nan")
    in_place: bool = True

    @classmethod
    def of(cls, booster: xgb.Booster, **keywords: Any) -> _Options:
        """Values themselves are predicted in place, with no DMatrix; XGBoost cannot for linear boosters."""
        more = any(keywords[name] for name in ("pred_leaf", "pred_contribs", "approx_contribs", "pred_interactions"))
        return cls(**keywords, in_place=not more and '"name":"gblinear"' not in booster.save_config())


def predict(
    client: Client | None,
    model: xgb.Booster,
    data: Any,
    *,
    output_margin: bool = False,
    pred_leaf: bool = False,
    pred_contribs: bool = False,
    approx_contribs: bool = False,
    pred_interactions: bool = False,
    validate_features: bool = True,
    iteration_range: tuple[int, int] = (0, 0),
    strict_shape: bool = False,
    base_margin: Any = None,
    missing: float = float("nan"),
) -> Any:
    """Predict every row of `data`, lazily; the keywords of `xgboost.Booster.predict`.

    Nothing runs before the result is computed, by whichever client or scheduler.
    The booster travels once to each worker, or with each task where that comes to
    4 MiB at most in all; a worker loads it once. A partition is predicted by one
    thread, and by more where a worker has fewer partitions to predict than threads.
    It is done on CPUs, wherever the booster was trained.

    Parameters
    ----------
    client : distributed.Client or None
        Not needed: the result is lazy, for synchronous and asynchronous clients
        alike. It is the first argument as in all calls.
    model : xgboost.Booster
        Or an XGBoost scikit-learn model, whose booster is used.
    data : dask array, dask dataframe, numpy array, scipy.sparse matrix or pandas dataframe
        Shape (rows, features). Of a dataframe exactly the model's features.
        Categories may be coded otherwise than in training; one the model
        has not seen is an error, as in XGBoost.
    output_margin, pred_leaf, pred_contribs, approx_contribs, pred_interactions : bool
    validate_features, iteration_range, strict_shape : optional
        As in `xgboost.Booster.predict`.
    base_margin : collection, optional
        One row for each row of `data`, with the same partitions.
    missing : float, default nan
        The value that stands for a missing one.

    Returns
    -------
    dask array, series or dataframe
        float32 (leaves: float32 too, as XGBoost has them). For an array: an array
        with the same chunks of rows. For a dataframe: a series, or a dataframe with
        columns 0, 1, ... where the model gives several values a row, with the
        input's index and partitions; where it gives a matrix a row (interactions),
        an array. numpy and pandas come back for numpy and pandas.

    Raises
    ------
    DataError
        If the features are not the model's, or partitions do not match.

    Examples
    --------
    >>> import dask.array as da, numpy as np, xgboost
    >>> X = np.random.default_rng(0).random((100, 3), dtype="float32")
    >>> booster = xgboost.train({}, xgboost.DMatrix(X, X[:, 0]), num_boost_round=2)
    >>> predict(None, booster, da.from_array(X, chunks=(50, 3)))
    dask.array<predict_block, shape=(100,), dtype=float32, chunksize=(50,), chunktype=numpy.ndarray>
    """
    booster = model if isinstance(model, xgb.Booster) else _booster_of(model)
    options = _Options.of(
        booster,
        output_margin=output_margin,
        pred_leaf=pred_leaf,
        pred_contribs=pred_contribs,
        approx_contribs=approx_contribs,
        pred_interactions=pred_interactions,
        validate_features=validate_features,
        iteration_range=tuple(iteration_range),
        strict_shape=strict_shape,
        missing=missing,
    )
    if not dask.is_dask_collection(data):
        return predict_block(data, base_margin, booster=booster, options=options, like_input=True)
    _check_features(booster, data, options)
    if partitions.is_array(data):
        return _predict_array(booster, data, base_margin, options)
    return _predict_frame(booster, data, base_margin, options)


def _layer(booster: xgb.Booster, tasks: int, **fixed: Any) -> tuple[sealed, dict[str, Any]]:
    """`predict_block` for so many tasks, and the keywords it is to be called with."""
    raw = bytes(booster.save_raw("ubj"))
    if len(raw) * tasks <= _WITH_TASKS:
        return sealed(predict_block, booster=_Model(raw), **fixed), {}
    # A task, not a value: values may be copied into every task that uses them.
    return sealed(predict_block, **fixed), {"booster": dask.delayed(sealed(_Model), pure=True)(raw)}


def _booster_of(model: Any) -> xgb.Booster:
    if hasattr(model, "get_booster"):
        return model.get_booster()
    raise TypeError(f"model is an xgboost.Booster, not {type(model).__name__}")


class _Model:
    """The booster on a worker, loaded once by the first task that needs it; it travels as bytes.

    One for each number of threads: a booster is asked by several tasks at once,
    and the number is part of it.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._loaded: dict[int, xgb.Booster] = {}
        self._loading = threading.Lock()

    def booster(self, threads: int) -> xgb.Booster:
        """With so many threads."""
        with self._loading:
            if threads not in self._loaded:
                booster = xgb.Booster(model_file=bytearray(self.raw))
                booster.set_param({"nthread": threads})
                self._loaded[threads] = booster
            return self._loaded[threads]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived if len(self.raw) <= _WITH_TASKS else _Model, (self.raw,)

    def __dask_tokenize__(self) -> Any:
        return "_Model", self.raw

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + 2 * len(self.raw)


@functools.lru_cache(maxsize=4)
def _arrived(raw: bytes) -> _Model:
    """One object for all tasks that bring the same bytes, also those of the next call."""
    return _Model(raw)


def _threads(rows: int) -> int:
    """How many threads are for this task: one, and more where its worker has fewer tasks than threads."""
    try:
        state = get_worker().state
    except ValueError:  # another scheduler's task
        return 1
    tasks = len(state.executing) + len(state.ready)
    return min(max(1, int(state.nthreads) // max(1, tasks)), 1 + rows // _ROWS_A_THREAD)


def _check_features(booster: xgb.Booster, data: Any, options: _Options) -> None:
    names = booster.feature_names
    if partitions.is_frame(data) and data.ndim == 1:
        raise DataError("data is a series; for a single feature pass data.to_frame()")
    if partitions.is_frame(data) and names is not None and options.validate_features:
        given = [str(name) for name in data.columns]
        if given != names:
            missing, extra = [n for n in names if n not in given], [n for n in given if n not in names]
            detail = f"missing {missing}, unknown {extra}" if missing or extra else "the order differs"
            raise DataError(f"data has other features than the model: {detail}. Use data[model.feature_names]")
    if data.ndim == 2 and data.shape[1] != booster.num_features():
        raise DataError(f"data has {data.shape[1]} features, and the model {booster.num_features()}")


def _sample(booster: xgb.Booster, data: Any, options: _Options, margin: Any) -> Any:
    """What two rows of the input's kind give: tells dtype and shape."""
    from dask.dataframe.utils import meta_nonempty

    rows = meta_nonempty(data._meta).iloc[:1] if partitions.is_frame(data) else np.zeros((1, booster.num_features()))
    if margin is not None:
        margin = np.zeros((1, *margin.shape[1:]) if margin.ndim > 1 else 1)
    return predict_block(rows, margin, booster=booster, options=options)


def _predict_array(booster: xgb.Booster, data: Any, margin: Any, options: _Options) -> Any:
    inputs = {"X": data} if margin is None else {"X": data, "base_margin": margin}
    arrays = list(partitions.align(inputs).values())
    sample = _sample(booster, data, options, margin)
    shape = sample.shape[1:]
    function, keywords = _layer(booster, arrays[0].numblocks[0], options=options, shape=shape)
    name = "predict_block-" + dask.base.tokenize(function, keywords, *arrays)
    return partitions.map_rows(function, arrays, shape, sample.dtype, name=name, **keywords)


def _predict_frame(booster: xgb.Booster, data: Any, margin: Any, options: _Options) -> Any:
    import dask.array as da
    import pandas as pd

    sample = _sample(booster, data, options, margin)
    shape, like_input = sample.shape[1:], sample.ndim <= 2
    function, keywords = _layer(booster, data.npartitions, options=options, shape=shape, like_input=like_input)
    margins = () if margin is None else (partitions.align({"data": data, "base_margin": margin})["base_margin"],)
    if margins and partitions.is_array(margins[0]):
        margins = (_frame_of(margins[0], data),)
    if not like_input:
        blocks = data.to_delayed()
        extra = [m.to_delayed() for m in margins]
        arrays = [
            da.from_delayed(dask.delayed(function)(*parts, **keywords), (math.nan, *shape), dtype=sample.dtype)
            for parts in zip(blocks, *extra)
        ]
        return da.concatenate(arrays, allow_unknown_chunksizes=True)
    index = data._meta.index
    meta: Any = pd.Series(np.empty(0, sample.dtype), index=index)
    if sample.ndim == 2:
        meta = pd.DataFrame(np.empty((0, *shape), sample.dtype), index=index)
    return data.map_partitions(
        function, *margins, **keywords, meta=meta,
        align_dataframes=False, enforce_metadata=False, clear_divisions=False,
    )  # fmt: skip


def _frame_of(array: Any, data: Any) -> Any:
    """An array as a frame, so that it can go along with one."""
    import dask.dataframe as dd

    return dd.from_dask_array(array)


def predict_block(
    X: Any,
    base_margin: Any = None,
    *,
    booster: xgb.Booster | _Model,
    options: _Options,
    shape: tuple[int, ...] | None = None,
    like_input: bool = False,
) -> Any:
    """Predict one block; `like_input` gives pandas for pandas, with its index.

    `shape` is what a row gives, which XGBoost does not tell of a block without rows.
    """
    margin = None if base_margin is None else np.asarray(base_margin)
    if shape is not None and not X.shape[0]:
        values = np.empty((0, *shape), dtype="float32")
    elif isinstance(booster, _Model):
        threads = _threads(X.shape[0])
        values = _values(booster.booster(threads), X, margin, options, threads)
    else:
        values = _values(booster, X, margin, options)
    if not like_input or not hasattr(X, "iloc"):
        return values
    import pandas as pd

    if values.ndim == 1:
        return pd.Series(values, index=X.index)
    return pd.DataFrame(values, index=X.index) if values.ndim == 2 else values


def _values(booster: xgb.Booster, X: Any, margin: Any, options: _Options, threads: int = 0) -> Any:
    frame = hasattr(X, "iloc")
    validate = options.validate_features and frame and booster.feature_names is not None
    if options.in_place:
        return booster.inplace_predict(
            X,
            iteration_range=options.iteration_range,
            predict_type="margin" if options.output_margin else "value",
            missing=options.missing,
            validate_features=validate,
            base_margin=margin,
            strict_shape=options.strict_shape,
        )
    matrix = xgb.DMatrix(
        X,
        base_margin=margin,
        missing=options.missing,
        enable_categorical=True,
        nthread=threads,
        feature_names=None if frame else booster.feature_names,
        feature_types=None if frame else booster.feature_types,
    )
    passed = asdict(options)
    del passed["missing"], passed["in_place"]
    return booster.predict(matrix, **{**passed, "validate_features": validate})
