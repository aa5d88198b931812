"""From collections to what a model is called with: which columns, in which form, of which shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dask_bridges.errors import DataError
from dask_keras.signature import Form, Outputs, Slot

__all__ = ["Feed", "Read", "cut", "feed_of", "length", "mapped", "targets_of"]


@dataclass(frozen=True)
class Read:
    """How one input is made of the blocks of a partition.

    Attributes
    ----------
    source : int
        Which block.
    column : object
        The column of it that is the input; None for all of it.
    slot : Slot or None
        What the model declares; None for what it does not (targets, inputs of subclassed models).
    """

    source: int
    column: Any = None
    slot: Slot | None = None

    def __call__(self, blocks: Sequence[Any]) -> Any:
        """The input, as a numpy array."""
        block = blocks[self.source]
        values = _numpy(block if self.column is None else block[self.column], self.slot)
        if self.slot is not None and len(self.slot.shape) == 1 and values.ndim == 1:
            return values[:, None]
        return values


def _numpy(block: Any, slot: Slot | None) -> Any:
    import keras

    floatx = str(keras.config.floatx())
    if hasattr(block, "iloc"):
        values = _of_frame(block, slot, floatx)
    else:
        values = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
    if values.dtype == np.float64 and (slot is None or slot.dtype != "float64"):
        return values.astype(slot.dtype if slot is not None and slot.dtype[:5] == "float" else floatx)
    return values


def _of_frame(frame: Any, slot: Slot | None, floatx: str) -> Any:
    """Columns as one array of what the model declares; floats are as long as the model's, and hold missing ones."""
    if slot is not None and slot.dtype == "string":
        return frame.to_numpy(dtype=object)
    if slot is not None and slot.dtype[:3] in ("int", "uin", "boo"):
        return _converted(frame, slot.dtype)
    dtypes = [frame.dtype] if frame.ndim == 1 else list(frame.dtypes)
    plain = len({str(dtype) for dtype in dtypes}) == 1 and isinstance(dtypes[0], np.dtype) and dtypes[0].kind in "iufbO"
    if slot is None and (plain or not all(map(_is_number, dtypes))):
        return frame.to_numpy()
    declared = floatx if slot is None or slot.dtype[:5] != "float" else slot.dtype
    return _converted(frame, declared, na_value=np.nan)


def _converted(frame: Any, dtype: str, **keywords: Any) -> Any:
    try:
        return frame.to_numpy(dtype=dtype, **keywords)
    except (TypeError, ValueError) as error:
        columns = [frame.name] if frame.ndim == 1 else list(frame.columns)
        raise DataError(f"columns {columns} are not all of numbers that {dtype} can hold: {error}") from error


@dataclass(frozen=True)
class Feed:
    """How the blocks of a partition become what the model is called with.

    Attributes
    ----------
    form : str
    names : tuple of str
        Keys of a dict; names for errors otherwise.
    reads : tuple of Read
    """

    form: Form
    names: tuple[str, ...]
    reads: tuple[Read, ...]

    def __call__(self, blocks: Sequence[Any]) -> Any:
        """Arrays, in the model's form."""
        return self.formed([read(blocks) for read in self.reads])

    def formed(self, values: Sequence[Any]) -> Any:
        """Values of the inputs, in the model's form."""
        return Outputs(self.form, tuple(Slot(name, (), "") for name in self.names), ()).formed(values)

    def moved(self, by: int) -> Feed:
        """The same, of blocks that come after `by` others."""
        reads = tuple(Read(read.source + by, read.column, read.slot) for read in self.reads)
        return Feed(self.form, self.names, reads)


def feed_of(
    model: Any, data: Any, slots: Sequence[Slot] | None, role: str = "data"
) -> tuple[Feed, dict[str, Any], list[Slot]]:
    """How `data` is fed to `model`.

    Parameters
    ----------
    model : keras.Model
    data : collection, or tuple, list or dict of them
    slots : sequence of Slot or None
        Its inputs, if it declares them.
    role : str
        What errors call `data`.

    Returns
    -------
    feed : Feed
    collections : dict
        By the names errors call them; the feed's sources in order.
    given : list of Slot
        The inputs in the form's order, as the data has them.

    Raises
    ------
    DataError
        If inputs or columns are missing or unknown, or shapes do not match.
    """
    form, parts = _parts(data)
    if form == "one" and slots is not None and _by_column(data, slots):
        return _columns(model, role, data, slots)
    ordered = _matched(model, role, form, parts, slots)
    collections = {role if form == "one" else f"{role}[{name!r}]": part for name, part in parts.items()}
    given = [
        _given(model, called, part, None if ordered is None else ordered[place])
        for place, (called, part) in enumerate(collections.items())
    ]
    names = tuple(str(name) for name in parts)
    if form == "dict":
        given = [replace(slot, name=name) for name, slot in zip(names, given)]
    reads = tuple(Read(place, None, ordered[place] if ordered else None) for place in range(len(parts)))
    return Feed(form, names, reads), collections, given


def _given(model: Any, called: str, part: Any, slot: Slot | None) -> Slot:
    """An input as the data has it, which must be as the model takes it."""
    shape = _row_shape(called, part)
    if slot is None:
        return Slot("input", shape, _dtype(part))
    _check_shape(model, called, shape, slot)
    _check_numbers(called, part, slot)
    return replace(slot, shape=(1,) if shape == () and len(slot.shape) == 1 else shape)


def targets_of(role: str, data: Any) -> tuple[Feed, dict[str, Any]]:
    """How targets or weights are fed: one, a tuple or a dict of them, as they are."""
    form, parts = _parts(data)
    feed = Feed(form, tuple(str(name) for name in parts), tuple(Read(source) for source in range(len(parts))))
    return feed, {role if form == "one" else f"{role}[{name!r}]": part for name, part in parts.items()}


def _parts(data: Any) -> tuple[Form, dict[Any, Any]]:
    if isinstance(data, Mapping):
        return "dict", dict(data)
    if isinstance(data, (tuple, list)):
        return "tuple", dict(enumerate(data))
    return "one", {None: data}


def _columns_of(data: Any) -> list[Any] | None:
    """Of a dataframe, Dask's or pandas's."""
    return list(data.columns) if hasattr(data, "columns") and getattr(data, "ndim", 0) == 2 else None


def _by_column(data: Any, slots: Sequence[Slot]) -> bool:
    """Whether inputs are columns of a frame by their names: all are, unless one input takes the whole frame."""
    columns = _columns_of(data)
    if columns is None:
        return False
    return len(slots) > 1 or (slots[0].shape in ((), (1,)) and len(columns) != 1 and slots[0].name in columns)


def _columns(model: Any, role: str, frame: Any, slots: Sequence[Slot]) -> tuple[Feed, dict[str, Any], list[Slot]]:
    by_name = {str(column): column for column in _columns_of(frame) or []}
    if missing := [slot.name for slot in slots if slot.name not in by_name]:
        raise DataError(
            f"{role} has no columns {missing} for the inputs of model {model.name!r} of these names; it has "
            f"{list(by_name)}. Rename them, or pass a dict of inputs: {{{missing[0]!r}: {role}[[...]]}}"
        )
    for slot in slots:
        column = frame[by_name[slot.name]]
        _check_shape(model, f"column {slot.name!r} of {role}", (), slot)
        _check_numbers(f"column {slot.name!r} of {role}", column, slot)
    names = tuple(slot.name for slot in slots)
    reads = tuple(Read(0, by_name[slot.name], slot) for slot in slots)
    return Feed("dict", names, reads), {role: frame}, list(slots)


def _matched(
    model: Any, role: str, form: Form, parts: dict[Any, Any], slots: Sequence[Slot] | None
) -> list[Slot] | None:
    """The model's inputs in the order of the parts."""
    if slots is None:
        return None
    names = [slot.name for slot in slots]
    if form == "dict":
        given = [str(name) for name in parts]
        missing, unknown = [n for n in names if n not in given], [n for n in given if n not in names]
        if missing or unknown:
            raise DataError(f"{role} has other inputs than model {model.name!r}: missing {missing}, unknown {unknown}")
        return [slots[names.index(name)] for name in given]
    if len(parts) != len(slots):
        raise DataError(
            f"{role} has {len(parts)} input{'s' * (len(parts) != 1)}, and model {model.name!r} takes {len(slots)}: "
            f"{names}"
        )
    return list(slots)


def _row_shape(called: str, part: Any) -> tuple[int | None, ...]:
    """The shape of one row; None where it is not known."""
    if not hasattr(part, "shape"):
        raise DataError(
            f"{called} is a {type(part).__name__}: pass Dask arrays or dataframes, or tuples or dicts of them"
        )
    if _columns_of(part) is not None:
        return (len(part.columns),)
    return tuple(None if isinstance(n, float) and math.isnan(n) else int(n) for n in tuple(part.shape)[1:])


def _check_shape(model: Any, called: str, shape: tuple[int | None, ...], slot: Slot) -> None:
    """Keras adds a last axis of length 1, or takes it away, as it needs."""
    for tried in (shape, (*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape):
        if len(tried) == len(slot.shape) and all(None in (a, b) or a == b for a, b in zip(tried, slot.shape)):
            return
    raise DataError(
        f"{called} has rows of the shape {shape}, and input {slot.name!r} of model {model.name!r} takes rows of the "
        f"shape {slot.shape}"
    )


def _check_numbers(called: str, part: Any, slot: Slot) -> None:
    if slot.dtype == "string" or not hasattr(part, "dtypes"):
        return
    columns = _columns_of(part)
    dtypes = [part.dtype] if columns is None else list(part.dtypes)
    wrong = [
        f"{name} ({dtype})"
        for name, dtype in zip([getattr(part, "name", "")] if columns is None else columns, dtypes)
        if not _is_number(dtype)
    ]
    if wrong:
        raise DataError(
            f"{called} has columns that are no numbers, and input {slot.name!r} takes {slot.dtype}: {', '.join(wrong)}"
        )


def _is_number(dtype: Any) -> bool:
    # Columns of dtype object may hold anything: what they hold tells when it is read.
    return getattr(dtype, "kind", "O") in "biufO" and str(dtype) not in ("category", "string", "str")


def _dtype(part: Any) -> str:
    """What the model gets where it declares nothing: its own floats for floats."""
    import keras

    if _columns_of(part) is not None:
        return str(keras.config.floatx())
    kind = np.dtype(part.dtype) if isinstance(part.dtype, np.dtype) else np.dtype("float32")
    return str(keras.config.floatx()) if kind == np.float64 else kind.name


def cut(values: Any, start: int, stop: int) -> Any:
    """Rows of every array of a structure."""
    return mapped(lambda array: array[start:stop], values)


def length(values: Any) -> int:
    """Rows of a structure of arrays."""
    one = (
        next(iter(values.values())) if isinstance(values, dict) else values[0] if isinstance(values, tuple) else values
    )
    return len(one)


def mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """`function` of every array in one, a tuple or a dict."""
    if isinstance(values, dict):
        return {name: function(array) for name, array in values.items()}
    return tuple(map(function, values)) if isinstance(values, tuple) else function(values)
