"""The state of a model: which arrays it is made of, by the paths under which Keras saves them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dask_serializers import tensors
from dask_serializers.keras import upstream
from dask_serializers.parcel import Stream
from dask_serializers.standin import CannotMove

__all__ = ["State", "saveables"]

Array = tuple[str, tuple[int, ...], memoryview]


def saveables(root: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) for everything that Keras would save of `root`, `root` itself first, each once."""
    seen: set[int] = set()

    def walk(path: str, saveable: Any) -> Iterator[tuple[str, Any]]:
        if id(saveable) in seen:
            return
        seen.add(id(saveable))
        yield path, saveable
        for name, child in upstream.children(saveable):
            yield from walk(f"{path}/{name}", child)

    yield from walk("", root)


def is_variable(value: Any) -> bool:
    """Whether `value` is a Keras variable."""
    import keras

    return isinstance(value, keras.Variable)


class State:
    """The state of one object, as seen from outside.

    Parameters
    ----------
    root : keras.Model, keras.Layer, keras.Optimizer or keras.Metric
    found : dict, optional
        What :func:`saveables` gives for it, where that is known.
    empty : bool
        Whether it has yet to get its state: what cannot be saved without one is passed over.
    """

    def __init__(self, root: Any, found: dict[str, Any] | None = None, *, empty: bool = False) -> None:
        self.saveables = dict(saveables(root)) if found is None else found
        #: path -> what the object saves of itself: Keras variables, or any arrays.
        self.stores: dict[str, dict[str, Any]] = {path: _store(each, empty) for path, each in self.saveables.items()}
        #: Paths of what needs the model to be complete and compiled: optimizers and metrics.
        self.late = _late(self.saveables)
        #: Variables that Keras does not save, such as the states of seed generators.
        self.unsaved = self._unsaved(root)

    def _unsaved(self, root: Any) -> list[Any]:
        saved = {id(value) for store in self.stores.values() for value in store.values()}
        metrics = {id(v) for each in self.saveables.values() if _is_metric(each) for v in each.variables}
        known = saved | metrics
        return [variable for variable in getattr(root, "variables", []) if id(variable) not in known]

    def forget_late(self) -> None:
        """Leave out the state of optimizers and metrics."""
        for path in self.late:
            self.stores[path] = {}

    def taken_apart(self, backend: str) -> tuple[dict[str, Any], list[Array]]:
        """A description of the state, and its arrays."""
        arrays: list[Array] = []
        paths: list[str | None] = []
        numbers: dict[int, int] = {}

        def number(value: Any) -> int:
            """The array's number, with what else a variable has."""
            if id(value) not in numbers:
                numbers[id(value)] = len(arrays)
                paths.append(value.path if is_variable(value) else None)
                arrays.append(tensors.host(value.value if is_variable(value) else value, backend))
            return numbers[id(value)]

        def numbered(paths: list[str]) -> dict[str, dict[str, int]]:
            return {path: {key: number(value) for key, value in self.stores[path].items()} for path in paths}

        filled = [path for path, store in self.stores.items() if store]
        stores = numbered([path for path in filled if path not in self.late])
        unsaved = [number(variable) for variable in self.unsaved]
        assets = {}
        for path, each in self.saveables.items():
            if hasattr(each, "save_assets") and (files := _assets(each)):
                assets[path] = {name: len(arrays) + i for i, name in enumerate(files)}
                arrays += [tensors.of_array(np.frombuffer(data, np.uint8)) for data in files.values()]
                paths += [None] * len(files)
        early = len(arrays)
        stores |= numbered([path for path in filled if path in self.late])
        described = {
            "stores": stores,
            "early": early,
            "paths": paths,
            "policies": self._policies(),
            "unsaved": unsaved,
            "assets": assets,
            "frozen": self._frozen(),
            "metrics": [path for path, each in self.saveables.items() if _is_metric(each)],
            "names": {path: type(self.saveables[path]).__name__ for path in stores},
        }
        return described, arrays

    def _policies(self) -> dict[str, Any]:
        import keras

        policies = {path: upstream.dtype_policy(each) for path, each in self.saveables.items()}
        return {path: keras.dtype_policies.serialize(each) for path, each in policies.items() if each is not None}

    def _frozen(self) -> list[str]:
        """Variables that do not train."""
        return [
            f"{path}\n{key}"
            for path, store in self.stores.items()
            for key, value in store.items()
            if is_variable(value) and not value.trainable
        ]


def _store(saveable: Any, empty: bool) -> dict[str, Any]:
    import keras

    store: dict[str, Any] = {}
    plain = isinstance(saveable, keras.Optimizer) and (
        type(saveable).save_own_variables is keras.Optimizer.save_own_variables  # which copies them
    )
    if plain or _is_metric(saveable):  # of which Keras saves nothing
        return {str(place): variable for place, variable in enumerate(saveable.variables)}
    if hasattr(saveable, "save_own_variables"):
        with suppress(Exception) if empty else nullcontext():
            saveable.save_own_variables(store)
    return store


def _late(saveables: dict[str, Any]) -> set[str]:
    import keras

    late: set[str] = set()
    for path, each in saveables.items():  # parents come first
        if isinstance(each, (keras.Optimizer, keras.Metric)) or any(path.startswith(f"{above}/") for above in late):
            late.add(path)
    return late


def _is_metric(saveable: Any) -> bool:
    import keras

    return isinstance(saveable, keras.Metric)


def _assets(saveable: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="dask-serializers-") as folder:
        saveable.save_assets(folder)
        return {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }


def _load_assets(saveable: Any, files: dict[str, np.ndarray[Any, Any]]) -> None:
    with tempfile.TemporaryDirectory(prefix="dask-serializers-") as folder:
        for name, data in files.items():
            target = Path(folder, name)
            if os.path.commonpath([folder, os.path.normpath(target)]) != folder:
                raise CannotMove(f"the asset {name!r} points out of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data.tobytes())
        saveable.load_assets(folder)


class Arriving:
    """A state on its way into an object that is being rebuilt without one.

    Parameters
    ----------
    described : dict
        What :meth:`State.taken_apart` said.
    first : int
        The stream's number of the state's first array.
    """

    def __init__(self, described: dict[str, Any], first: int) -> None:
        self.described = described
        self.first = first
        self.here: State
        #: number -> arrays that are no variable's
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}

    def read(self, root: Any, stream: Stream, backend: str, *, late: bool, found: dict[str, Any] | None = None) -> None:
        """Take the arrays of one half from the stream, inside :func:`upstream.uninitialized`.

        Variables have their values once that scope is left.
        """
        self.here = State(root, found, empty=True)
        early = self.described["early"]
        targets = self._targets()
        for number in range(early, len(stream.specs) - self.first) if late else range(early):
            dtype, shape = stream.specs[self.first + number]
            if number not in targets:
                self.arrays[number] = tensors.read_array(stream, dtype, shape)
                continue
            value = tensors.read_tensor(stream, dtype, shape, backend)
            for variable in targets[number]:
                _check_shape(variable, shape)
                upstream.set_path(variable, self.described["paths"][number])
                upstream.give_value(variable, value)

    def _targets(self) -> dict[int, list[Any]]:
        """Number -> the variables that take the array as their first value."""
        targets: dict[int, list[Any]] = {}
        for path, store in self.described["stores"].items():
            ours = self.here.stores.get(path, {})
            for key, number in store.items():
                if is_variable(ours.get(key)):
                    targets.setdefault(number, []).append(ours[key])
        theirs = self.described["unsaved"]
        if len(theirs) == len(self.here.unsaved):
            for number, variable in zip(theirs, self.here.unsaved, strict=True):
                targets.setdefault(number, []).append(variable)
        return targets

    def set_policies(self) -> None:
        """Give models the dtype policy their ``from_config`` forgets; ``compile`` asks for it."""
        import keras

        for path, policy in self.described["policies"].items():
            saveable: Any = self.here.saveables.get(path)
            if upstream.dtype_policy(saveable) is not None:
                saveable.dtype_policy = keras.dtype_policies.deserialize(policy)

    def finish(self) -> None:
        """With the scope left: load what is no variable, and check that nothing is missing."""
        if len(self.described["unsaved"]) != len(self.here.unsaved):
            raise CannotMove(
                f"it has {len(self.described['unsaved'])} states that Keras does not save (of seed generators), and "
                f"{len(self.here.unsaved)} where it is rebuilt: make them in __init__() or build()"
            )
        frozen = set(self.described["frozen"])
        for path, store in self.described["stores"].items():
            saveable = self.here.saveables.get(path)
            ours = self.here.stores.get(path, {})
            for key in store:
                if is_variable(ours.get(key)):
                    trains = f"{path}\n{key}" not in frozen
                    if ours[key].trainable != trains:
                        ours[key].trainable = trains
            lost = [key for key in store if not is_variable(ours.get(key))]
            if lost and getattr(saveable, "lora_enabled", False):
                continue  # Keras saves the product of LoRA's factors; the factors are among the unsaved
            if saveable is not None and _loads_by_itself(saveable, lost):
                saveable.load_own_variables(self._store_for(saveable, store, ours))
            elif lost and path not in self.described["metrics"]:
                where = f"{path.lstrip('/') or 'the model'} ({self.described['names'][path]})"
                raise CannotMove(
                    f"{len(lost)} variables of {where} have no place in the rebuilt one: it makes them later than in "
                    "build(). Make them in build(), or implement get_build_config() and build_from_config()"
                )
        for path, files in self.described["assets"].items():
            _load_assets(self.here.saveables[path], {name: self.arrays[number] for name, number in files.items()})

    def _store_for(self, saveable: Any, store: dict[str, int], ours: dict[str, Any]) -> dict[str, Any]:
        """What the object's own ``load_own_variables`` is given: arrays, as from a file, except to Keras's own."""
        keras_own = type(saveable).load_own_variables.__module__.partition(".")[0] == "keras"
        found: dict[str, Any] = {}
        for key, number in store.items():
            variable = ours.get(key)
            if not is_variable(variable):
                found[key] = self.arrays[number]
            else:
                found[key] = variable if keras_own else np.asarray(variable)
        return found


def _check_shape(variable: Any, shape: tuple[int, ...]) -> None:
    if tuple(variable.shape) != shape:
        raise CannotMove(
            f"variable {variable.path} has the shape {shape} where it came from and {tuple(variable.shape)} here: its "
            "layer's get_config() does not describe it fully"
        )


def _loads_by_itself(saveable: Any, lost: list[str]) -> bool:
    """Whether the object's ``load_own_variables`` does more than to assign variables, which have their values."""
    import keras

    load = getattr(type(saveable), "load_own_variables", None)
    if load in (None, keras.Layer.load_own_variables, keras.Optimizer.load_own_variables):
        return False
    return bool(lost) or hasattr(saveable, "finalize_state") or load.__module__.partition(".")[0] != "keras"
