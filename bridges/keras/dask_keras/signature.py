"""What a model takes and gives: names, shapes and dtypes of its inputs and outputs, known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dask_bridges.errors import DataError

__all__ = ["Form", "Outputs", "Slot", "check_built", "inputs_of", "outputs_of"]

#: Of several inputs or outputs: one alone, a tuple of them, or a dict.
Form = Literal["one", "tuple", "dict"]


@dataclass(frozen=True)
class Slot:
    """One input or output of a model.

    Attributes
    ----------
    name : str
    shape : tuple of int or None
        Of one row; None where a model takes any length.
    dtype : str
        As Keras names it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def check_built(model: Any) -> None:
    """See that `model` is a Keras model with weights.

    Raises
    ------
    TypeError
        If it is something else.
    DataError
        If it is not built.
    """
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(f"model is a keras.Model, not {type(model).__name__}")
    if not model.built:
        raise DataError(
            f"model {model.name!r} is not built, so it has no weights yet: give it a keras.Input, call "
            "model.build(shape), or call it on a batch"
        )


def inputs_of(model: Any) -> tuple[Slot, ...] | None:
    """The inputs a model declares, in their order; None for subclassed models, which do not."""
    import keras

    tensors = getattr(model, "inputs", None)
    if not isinstance(tensors, list) or not all(isinstance(each, keras.KerasTensor) for each in tensors):
        return None
    specs = model.input_spec
    if not isinstance(specs, list) or len(specs) != len(tensors):
        specs = tensors
    # Of inputs given as a dict the keys, which the specs have and tensors need not.
    return tuple(
        Slot(str(getattr(spec, "name", None) or tensor.name), tuple(tensor.shape[1:]), str(tensor.dtype))
        for spec, tensor in zip(specs, tensors)
    )


@dataclass(frozen=True)
class Outputs:
    """What is wanted of what a model gives.

    Attributes
    ----------
    form : str
        Of the result.
    slots : tuple of Slot
        The outputs wanted.
    places : tuple of int, str or None
        Where each is in what the model gives: a position, a key, or None if it gives that one alone.
    """

    form: Form
    slots: tuple[Slot, ...]
    places: tuple[int | str | None, ...]

    def taken(self, given: Any) -> list[Any]:
        """The wanted outputs of a batch."""
        return [given if place is None else given[place] for place in self.places]

    def formed(self, results: Sequence[Any]) -> Any:
        """The results of all outputs, in the form the model gives them."""
        if self.form == "one":
            return results[0]
        return dict(zip((slot.name for slot in self.slots), results)) if self.form == "dict" else tuple(results)

    def chosen(self, names: str | Sequence[str] | None) -> Outputs:
        """Those of the given names; a name gives one result, names give a tuple.

        Raises
        ------
        DataError
            If there is no such output.
        """
        if names is None:
            return self
        there = [slot.name for slot in self.slots]
        wanted = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in wanted if name not in there]:
            raise DataError(f"output={unknown} are not outputs of the model, which has {there}")
        at = [there.index(name) for name in wanted]
        form: Form = "one" if isinstance(names, str) else "tuple"
        return Outputs(form, tuple(self.slots[i] for i in at), tuple(self.places[i] for i in at))


def outputs_of(model: Any, form: Form, slots: Sequence[Slot]) -> Outputs:
    """What `model` gives for inputs like these, found without a row of data.

    Parameters
    ----------
    model : keras.Model
    form : str
        In which the inputs are given.
    slots : sequence of Slot
        The inputs as they are given.

    Raises
    ------
    DataError
        If the model does not take them, or gives something without a row for each row.
    """
    given = _given(model, form, slots)
    if isinstance(given, Mapping):
        places: list[Any] = list(given)
        named = [str(name) for name in given]
        return Outputs("dict", tuple(_slot(name, given[place]) for name, place in zip(named, places)), tuple(places))
    names = getattr(model, "output_names", None)
    if isinstance(given, (list, tuple)):
        if not names or len(names) != len(given):
            names = [str(place) for place in range(len(given))]
        return Outputs("tuple", tuple(map(_slot, names, given)), tuple(range(len(given))))
    return Outputs("one", (_slot(names[0] if names else "output", given),), (None,))


def _slot(name: str, given: Any) -> Slot:
    if not hasattr(given, "shape") or not hasattr(given, "dtype"):
        raise DataError(f"output {name!r} of the model is itself a {type(given).__name__} of outputs: flatten it")
    if not given.shape or given.shape[0] is not None:
        raise DataError(f"output {name!r} of the model, of shape {tuple(given.shape)}, has no row for each row of data")
    return Slot(name, tuple(given.shape[1:]), str(given.dtype))


def _given(model: Any, form: Form, slots: Sequence[Slot]) -> Any:
    """The structure of symbolic tensors that a model gives."""
    import keras

    def of_form(values: list[Any]) -> Any:
        return Outputs(form, tuple(slots), ()).formed(values)

    symbolic = type(model).predict_step is keras.Model.predict_step
    try:
        if symbolic:
            return model.compute_output_spec(of_form([keras.KerasTensor((None, *s.shape), s.dtype) for s in slots]))
    except Exception:
        pass  # there are models which cannot be traced: what runs tells, and says what is wrong
    try:
        rows = [np.zeros((3, *(1 if n is None else n for n in s.shape)), _sampled(s.dtype)) for s in slots]
        return keras.tree.map_structure(_as_declared, model.predict_on_batch(of_form(rows)))
    except Exception as error:
        shapes = ", ".join(f"{slot.name}: {slot.shape}" for slot in slots)
        built = (model.get_build_config() or {}).get("input_shape")
        raise DataError(
            f"model {model.name!r} does not take rows of the shape ({shapes})"
            + (f"; it was built for batches of the shape {built}" if built else "")
            + f". It says: {type(error).__name__}: {error}"
        ) from error


def _sampled(dtype: str) -> Any:
    return np.dtype(object) if dtype == "string" else dtype


def _as_declared(batch: Any) -> Any:
    """What was given for three rows, as a tensor of any number of rows."""
    import keras

    rows = None if batch.ndim and batch.shape[0] == 3 else batch.shape[0] if batch.ndim else 0
    return keras.KerasTensor((rows, *batch.shape[1:]), str(batch.dtype))
