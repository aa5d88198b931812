"""Taking Keras objects apart, and rebuilding them."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import keras

from dask_serializers import tensors
from dask_serializers.callers import asked_by_dask, pickle_allowed
from dask_serializers.hooks import forget
from dask_serializers.hooks import teach as teach_dispatcher
from dask_serializers.keras import upstream
from dask_serializers.keras.custom import Describer, load, restored
from dask_serializers.keras.sizes import size
from dask_serializers.keras.state import Arriving, State, saveables
from dask_serializers.parcel import Parcel, Stream, arrive, arrive_nested, as_pickled, leave
from dask_serializers.standin import CannotMove

__all__ = ["rebuild", "teach", "unteach"]

TYPES = (keras.Layer, keras.Model, keras.Optimizer, keras.Metric, keras.Variable)


def teach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Take the place of any serializer that Dask has for objects of Keras."""
    teach_dispatcher(serialize, TYPES, dumps)
    teach_dispatcher(deserialize, TYPES, arrive)
    teach_dispatcher(sizeof, TYPES, size)
    upstream.KerasSaveable.__reduce_ex__ = _reduce_ex
    keras.Variable.__reduce_ex__ = _reduce_ex


def unteach(serialize: Any, deserialize: Any, sizeof: Any) -> None:
    """Undo :func:`teach`."""
    for dispatcher in (serialize, deserialize, sizeof):
        forget(dispatcher, TYPES)
    for cls in (upstream.KerasSaveable, keras.Variable):
        if "__reduce_ex__" in vars(cls):
            del cls.__reduce_ex__


def _reduce_ex(obj: Any, protocol: Any) -> Any:
    """How Dask pickles an object that holds this one; anyone else's pickle is as ever."""
    own = type(obj).__reduce__ not in (upstream.base_reduce, object.__reduce__)
    if own or not isinstance(obj, TYPES) or not asked_by_dask():
        return object.__reduce_ex__(obj, protocol)
    header, frames = leave(lambda: take_apart(obj), _called(obj))
    return arrive_nested, (header, *as_pickled(frames, int(protocol)))


def dumps(obj: Any) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of an object that travels by itself.

    Raises
    ------
    NotImplementedError
        Where custom code is needed, so that Dask goes on to pickle, which says so to a client that forbids pickle.
    """
    allowed = pickle_allowed()
    header, frames = leave(lambda: take_apart(obj, pickle=allowed), _called(obj))
    if header.get("pickled"):
        raise NotImplementedError
    return header, frames


def _called(obj: Any) -> str:
    return f"{type(obj).__name__} {getattr(obj, 'name', '')!r}"


def take_apart(obj: Any, *, pickle: bool = True, training: bool = True) -> Parcel:
    """Everything an object consists of; without `training`, a model that only predicts and evaluates where it arrives.

    Such a one leaves its optimizer behind, with two more copies of the weights, and the running values of metrics.
    """
    backend = keras.backend.backend()
    if isinstance(obj, keras.Variable):
        return _variable_apart(obj, backend)
    describer = Describer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of what a file would lose; nothing is lost here
        description = {
            "type": _kind(obj),
            "object": describer.describe(obj),
            "attributes": describer.describe(_set_by_compile(obj)),
        }
    _check_pickle(describer, pickle)
    description["modules"] = sorted(describer.modules)
    whole = State(obj)
    if not training:
        whole.forget_late()
        if "optimizer" in (description["object"].get("compile_config") or {}):
            description["object"]["compile_config"]["optimizer"] = None
    description["optimizers"] = _optimizers(obj, whole.saveables) if training else {}
    description["constants"] = len(describer.arrays)
    state, arrays = whole.taken_apart(backend)
    return Parcel(
        kind="keras",
        description={**description, "state": state},
        arrays=[tensors.of_array(array) for array in describer.arrays] + arrays,
        pickled=describer.pickled(),
        versions={"keras": keras.__version__, "backend": backend},
    )


def _check_pickle(describer: Describer, allowed: bool) -> None:
    if describer.custom and not allowed:
        names = ", ".join(sorted(key.split(":")[1] for key in describer.custom))
        raise CannotMove(
            f"it needs {names}, which only pickle can send, and this transfer is restricted to other serializers. "
            "Register them with keras.saving.register_keras_serializable in a module that both sides import"
        )


def _kind(obj: Any) -> str:
    for name in ("Model", "Layer", "Optimizer", "Metric"):
        if isinstance(obj, getattr(keras, name)):
            return name
    raise TypeError(f"{type(obj).__name__} is no model, layer, optimizer, metric or variable")


def _set_by_compile(obj: Any) -> dict[str, Any]:
    """What a model's own ``compile`` may have set, which Keras does not describe (two optimizers of a GAN, say)."""
    if not isinstance(obj, keras.Model) or not _compiles_by_itself(obj) or not obj.compiled:
        return {}
    kept = (keras.Optimizer, keras.Metric, keras.Loss, bool, int, float, str)
    return {
        name: value
        for name, value in vars(obj).items()
        if not name.startswith("_") and (isinstance(value, kept) or _users_function(value))
    }


def _users_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__module__.partition(".")[0] != "keras"


def _compiles_by_itself(model: Any) -> bool:
    own = type(model)
    return own.compile is not keras.Model.compile and own.compile_from_config is keras.Model.compile_from_config


def _optimizers(obj: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Path of each built optimizer -> the variables it was built with: their places in ``obj.variables``."""
    places = {id(variable): place for place, variable in enumerate(getattr(obj, "variables", []))}
    alone = isinstance(obj, keras.Optimizer)
    built = {}
    for path, each in found.items():
        if isinstance(each, keras.Optimizer) and each.built:
            trained = upstream.optimizer_variables(each)
            if not alone and not {id(v) for v in trained} <= places.keys():
                raise CannotMove(
                    f"{path.lstrip('/')} trains variables that are not the model's. Move both in one model"
                )
            built[path] = [[v.name, list(v.shape), str(v.dtype)] if alone else places[id(v)] for v in trained]
    return built


def _variable_apart(variable: Any, backend: str) -> Parcel:
    described = {name: getattr(variable, name) for name in ("name", "path", "trainable", "aggregation")}
    return Parcel(
        kind="keras",
        description={"type": "Variable", "object": described},
        arrays=[tensors.host(variable.value, backend)],
        versions={"keras": keras.__version__, "backend": backend},
    )


def rebuild(parcel: Parcel) -> Any:
    """The object a parcel describes."""
    backend = keras.backend.backend()
    stream = parcel.stream
    assert stream is not None
    if parcel.description["type"] == "Variable":
        return _rebuild_variable(parcel.description["object"], stream, backend)
    first = parcel.description["constants"]
    constants = [tensors.read_array(stream, dtype, shape) for dtype, shape in stream.specs[:first]]
    read = stream.reads
    description = parcel.description
    custom = load(parcel.pickled, description["modules"])
    with keras.saving.custom_object_scope(custom), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _rebuilt(description, constants, stream, backend, upstream.uninitialized, safe=not custom)
        except Exception:
            # Code of the user's that makes a variable of a value, or works with one while building: it draws its
            # random weights then, and they are overwritten.
            if stream.reads > read:
                raise
            return _rebuilt(description, constants, stream, backend, nullcontext, safe=not custom)


def _rebuilt(
    description: dict[str, Any], constants: list[Any], stream: Stream, backend: str, lazily: Any, *, safe: bool
) -> Any:
    config = restored(description["object"], constants)
    attributes = restored(description["attributes"], constants)
    compiled = config.pop("compile_config", None)
    arriving = Arriving(description["state"], description["constants"])
    with upstream.sharing():
        with lazily() if description["type"] in ("Model", "Layer") else nullcontext():
            with upstream.built_at_once():
                root = upstream.deserialize(config, safe_mode=safe)
            arriving.read(root, stream, backend, late=False)
        arriving.set_policies()
        if compiled:
            _compile(root, compiled, safe)
        for name, value in upstream.deserialize(attributes, safe_mode=safe).items():
            if not hasattr(root, name):
                setattr(root, name, value)
        with lazily():
            found = dict(saveables(root))
            _build_optimizers(root, found, description["optimizers"], lazily is upstream.uninitialized)
            arriving.read(root, stream, backend, late=True, found=found)
    arriving.finish()
    return root


def _compile(model: Any, config: dict[str, Any], safe: bool) -> None:
    if type(model).compile_from_config is not keras.Model.compile_from_config:
        model.compile_from_config(config)
        return
    keras.Model.compile(model, **upstream.deserialize(config, safe_mode=safe))


def _build_optimizers(root: Any, found: dict[str, Any], built: dict[str, Any], lazily: bool) -> None:
    """Make the slots of every optimizer that had them; without values, where `lazily`."""
    variables = getattr(root, "variables", []) if built else []
    for path, each in found.items():
        if path in built and isinstance(each, keras.Optimizer) and not each.built:
            with upstream.eager():
                trained = [_placeholder(*v) if isinstance(v, list) else variables[v] for v in built[path]]
                lazy = lazily and upstream.builds_lazily(each)
            with nullcontext() if lazy else upstream.eager():
                each.build(trained)


def _placeholder(name: str, shape: list[int], dtype: str) -> Any:
    """A variable for an optimizer that came without the model it trains."""
    return keras.Variable("zeros", shape=shape, dtype=dtype, name=name)


def _rebuild_variable(described: dict[str, Any], stream: Stream, backend: str) -> Any:
    ((dtype, shape),) = stream.specs
    value = tensors.read_tensor(stream, dtype, shape, backend)
    variable = keras.Variable(
        lambda *args, **kwargs: value,
        shape=shape,
        dtype=dtype,
        trainable=described["trainable"],
        name=described["name"],
        aggregation=described["aggregation"],
    )
    upstream.set_path(variable, described["path"])
    return variable
