"""`predict`: lazy, one layer on the graph, the model one node of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import dask
import numpy as np
from distributed import Client

from dask_bridges import partitions
from dask_bridges.errors import DataError
from dask_bridges.shipping import sealed
from dask_keras.inputs import Feed, cut, feed_of, length, mapped
from dask_keras.kept import Kept, Packed, kept, pack
from dask_keras.signature import Outputs, Slot, check_built, inputs_of, outputs_of

__all__ = ["predict"]


@dataclass(frozen=True)
class Plan:
    """What every partition is predicted with.

    Attributes
    ----------
    token : str
        Of the model.
    feed : Feed
    outputs : Outputs
    batch_size : int
    """

    token: str
    feed: Feed
    outputs: Outputs
    batch_size: int


def predict(
    client: Client | None, model: Any, data: Any, *, batch_size: int, output: str | Sequence[str] | None = None
) -> Any:
    """Predict every row of `data`, lazily, with a Keras model.

    Nothing runs before the result is computed, by whichever client or scheduler. The model is taken as it is
    now: training it afterwards does not change the result. It travels once to each worker, which keeps it for
    other partitions and for later calls.

    Parameters
    ----------
    client : distributed.Client or None
        Not needed: the result is lazy, for synchronous and asynchronous clients alike. It is the first
        argument as in all calls.
    model : keras.Model
        Built; it need not be compiled. Sequential, functional or subclassed, on any backend, which the workers
        must have too.
    data : dask array, dataframe or series, or tuple or dict of them
        One for each input of the model, a dict by the inputs' names; arrays of shape (rows, ...). Of a
        dataframe, a model with one input takes all columns in order; the inputs of a model with several take
        the columns of their names, and others are ignored. numpy and pandas are predicted here, at once.
    batch_size : int
        Rows in one call of the model; the last batch of a partition may have less.
    output : str or sequence of str, optional
        Which outputs of a model with several: one by its name, or a tuple of them. Names are the keys where
        the model gives a dict, the output layers' in other functional models, and "0", "1", ... else.

    Returns
    -------
    dask array, series or dataframe, or tuple or dict of them
        A tuple or a dict as the model gives its outputs (a tuple for a list). Each with the dtype the model
        gives, and the input's partitions, rows and order. For arrays: an array with the same chunks of rows.
        For dataframes, with the input's index: a series for an output of shape (rows,), a dataframe with columns
        0, 1, ... for (rows, k), also where k is 1, and an array where rows have more axes. A tuple or dict of
        inputs counts as its first one.

    Raises
    ------
    DataError
        If the model is not built, inputs or columns are missing or unknown, shapes are not the model's, or
        partitions do not match.
    dask_serializers.CannotMove
        If the model cannot leave this process.

    Examples
    --------
    >>> import dask.array as da, keras                                            # doctest: +SKIP
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])     # doctest: +SKIP
    >>> dask_keras.predict(None, model, da.ones((100, 3), chunks=(50, 3)), batch_size=32)  # doctest: +SKIP
    dask.array<predict_blocks, shape=(100, 2), dtype=float32, chunksize=(50, 2), chunktype=numpy.ndarray>
    """
    check_built(model)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least 1 row makes a batch")
    feed, collections, given = feed_of(model, data, inputs_of(model))
    outputs = outputs_of(model, feed.form, given).chosen(output)
    if not any(map(dask.is_dask_collection, collections.values())):
        return _predict_here(model, Plan("", feed, outputs, batch_size), list(collections.values()))
    aligned = list(partitions.align(collections).values())
    packed = pack(model)
    plan = Plan(packed.token, feed, outputs, batch_size)
    if all(map(partitions.is_array, aligned)):
        return outputs.formed(_arrays(packed, plan, aligned))
    if len(outputs.slots) == 1 and len(outputs.slots[0].shape) < 2 and all(map(partitions.is_frame, aligned)):
        return outputs.formed([_frame(packed, plan, aligned)])
    return outputs.formed(_by_partition(packed, plan, aligned))


def _predict_here(model: Any, plan: Plan, blocks: list[Any]) -> Any:
    here = Kept().filled(lambda: model)
    results = _predicted(here, plan, blocks)
    if hasattr(blocks[0], "iloc"):
        results = [_like(values, blocks[0]) for values in results]
    return plan.outputs.formed(results)


# Layers on the graph


def _dtype(slot: Slot) -> Any:
    from dask_serializers.parcel import np_dtype

    return np.dtype(object) if slot.dtype == "string" else np_dtype(slot.dtype)


def _lengths(slot: Slot) -> tuple[float, ...]:
    return tuple(math.nan if n is None else n for n in slot.shape)


def _arrays(packed: Packed, plan: Plan, arrays: list[Any]) -> list[Any]:
    """One layer for all outputs, and if they are several, one for each that takes its own."""
    function, slots = sealed(predict_blocks, plan=plan), plan.outputs.slots
    name = "predict_blocks-" + dask.base.tokenize(plan, *arrays)
    if len(slots) == 1:
        declared = _lengths(slots[0]), _dtype(slots[0])
        return [partitions.map_rows(function, arrays, *declared, name=name, model=packed.node())]
    # A tuple of outputs for each block.
    layer = partitions.map_rows(function, arrays, (), np.dtype(object), name=name, model=packed.node())
    return [
        partitions.map_rows(
            sealed(itemgetter(place)), [layer], _lengths(slot), _dtype(slot), name=f"predict_output-{place}-{name}"
        )
        for place, slot in enumerate(slots)
    ]


def _meta(slot: Slot, frame: Any) -> Any:
    return _like(np.empty((0, *(n or 0 for n in slot.shape)), _dtype(slot)), frame._meta)


def _frame(packed: Packed, plan: Plan, frames: list[Any]) -> Any:
    return frames[0].map_partitions(
        sealed(predict_blocks, plan=plan, like_input=True), *frames[1:], model=packed.node(),
        meta=_meta(plan.outputs.slots[0], frames[0]),
        align_dataframes=False, enforce_metadata=False, clear_divisions=False,
    )  # fmt: skip


def _by_partition(packed: Packed, plan: Plan, collections: list[Any]) -> list[Any]:
    """Where kinds are mixed: a task for each partition, and one that takes each output of it."""
    lead = collections[0]
    node, name = packed.node(), "predict_blocks-" + dask.base.tokenize(plan, *collections)
    like_input = partitions.is_frame(lead)
    call = dask.delayed(sealed(predict_blocks, plan=plan, like_input=like_input, always_tuple=True), pure=True)
    parts = [
        call(*blocks, model=node, dask_key_name=f"{name}-{number}")
        for number, blocks in enumerate(zip(*(np.ravel(each.to_delayed()) for each in collections)))
    ]
    rows = lead.chunks[0] if partitions.is_array(lead) else (math.nan,) * len(parts)
    return [
        _joined([dask.delayed(itemgetter(place), pure=True)(part) for part in parts], slot, lead, rows)
        for place, slot in enumerate(plan.outputs.slots)
    ]


def _joined(parts: list[Any], slot: Slot, lead: Any, rows: Sequence[float]) -> Any:
    if partitions.is_frame(lead) and len(slot.shape) < 2:
        import dask.dataframe as dd

        return dd.from_delayed(parts, meta=_meta(slot, lead), divisions=lead.divisions, verify_meta=False)
    import dask.array as da

    blocks = [da.from_delayed(part, (n, *_lengths(slot)), dtype=_dtype(slot)) for part, n in zip(parts, rows)]
    return da.concatenate(blocks, allow_unknown_chunksizes=True)


# On the workers


def predict_blocks(*blocks: Any, model: bytes, plan: Plan, like_input: bool = False, always_tuple: bool = False) -> Any:
    """Predict one partition; a tuple for several outputs.

    `like_input` gives pandas, with the index of the first block.
    """
    results = _predicted(kept(plan.token, model), plan, blocks)
    if like_input:
        results = [_like(values, blocks[0]) for values in results]
    return results[0] if len(results) == 1 and not always_tuple else tuple(results)


def _predicted(here: Kept, plan: Plan, blocks: Sequence[Any]) -> list[Any]:
    """What each output gives for the rows of a partition."""
    rows = {int(block.shape[0]) for block in blocks}
    if len(rows) > 1:
        raise DataError(f"blocks of one partition have {sorted(rows)} rows: the inputs do not match row for row")
    total = rows.pop()
    if not total:
        return [np.empty((0, *(n or 0 for n in slot.shape)), _dtype(slot)) for slot in plan.outputs.slots]
    x = plan.feed(blocks)
    batches = [
        plan.outputs.taken(_batch(here, cut(x, start, start + plan.batch_size), plan.batch_size))
        for start in range(0, total, plan.batch_size)
    ]
    return [_checked(np.concatenate(parts), slot, total) for slot, parts in zip(plan.outputs.slots, zip(*batches))]


def _batch(here: Kept, x: Any, batch_size: int) -> Any:
    """Predict one batch. Where each number of rows is compiled for, there are few such numbers."""
    rows = length(x)
    padded = min(batch_size, 1 << (rows - 1).bit_length())
    if padded == rows or not here.compiles_shapes():
        return here.predict(x)
    filler = mapped(lambda a: np.concatenate([a, np.repeat(a[-1:], padded - rows, axis=0)]), x)
    given = here.predict(filler)
    if isinstance(given, list):
        given = tuple(given)
    return mapped(lambda a: a[:rows], given)


def _checked(values: Any, slot: Slot, rows: int) -> Any:
    declared = (rows, *slot.shape)
    if len(values.shape) != len(declared) or any(n not in (None, m) for n, m in zip(declared, values.shape)):
        raise DataError(
            f"output {slot.name!r} of the model has the shape {values.shape} for {rows} rows, and {declared} was "
            "declared"
        )
    return values.astype(_dtype(slot), copy=False)


def _like(values: Any, block: Any) -> Any:
    """As pandas, with the index of `block`, where a row has one axis at most."""
    import pandas as pd

    if values.ndim > 2:
        return values
    if values.dtype.kind == "V":  # bfloat16, which pandas does not know
        values = values.astype("float32")
    return (pd.Series if values.ndim == 1 else pd.DataFrame)(values, index=block.index)
