"""Models on their way to the workers, and kept there: rebuilt once a process, found again by what they consist of."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dask

from dask_bridges.errors import PlacementError

__all__ = ["KEEP", "Kept", "Packed", "kept", "pack"]

#: Bytes of the models that a process keeps beside the last one.
KEEP = 2**30


@dataclass(frozen=True)
class Packed:
    """A model as bytes.

    Attributes
    ----------
    token : str
        The same for the same architecture, weights, losses and metrics.
    raw : bytes
        What `kept` rebuilds it from.
    """

    token: str
    raw: bytes = field(repr=False)

    def node(self) -> Any:
        """One task for all that use the model: values may be copied into each of them."""
        return dask.delayed(bytes, pure=True)(self.raw, dask_key_name=f"keras-model-{self.token}")


def pack(model: Any) -> Packed:
    """The model as it is now, without its optimizer and the running values of its metrics.

    Raises
    ------
    dask_serializers.CannotMove
        If it cannot leave this process.
    """
    from dask_serializers.keras.moving import take_apart
    from dask_serializers.parcel import pack as header_and_frames

    header, frames = header_and_frames(take_apart(model, training=False))
    # The frames alias the weights: this is the one copy.
    raw = pickle.dumps((header, [pickle.PickleBuffer(frame) for frame in frames]), protocol=5)
    return Packed(hashlib.blake2b(raw, digest_size=16).hexdigest(), raw)


class Kept:
    """A model in a process that predicts, and what its threads have to agree on.

    Attributes
    ----------
    lock : threading.Lock
        Held while the model is rebuilt, evaluates (metrics are state), or predicts where Keras changes the model
        meanwhile: JAX takes the weights out of it and puts them back.
    model : keras.Model or None
        Until it is rebuilt.
    nbytes : int
    """

    def __init__(self, nbytes: int = 0) -> None:
        self.lock = threading.RLock()
        self.model: Any = None
        self.nbytes = nbytes
        self._compiled = False

    def filled(self, make: Callable[[], Any]) -> Kept:
        """With its model, which the first thread makes and the others wait for."""
        with self.lock:
            if self.model is None:
                self.model = _for_inference(make())
        return self

    def predict(self, x: Any) -> Any:
        """What ``model.predict_on_batch`` gives, from any thread."""
        import keras

        if self._compiled and keras.backend.backend() != "jax":
            return self.model.predict_on_batch(x)
        with self.lock:
            found = self.model.predict_on_batch(x)
            self._compiled = True
        return found

    def compiles_shapes(self) -> bool:
        """Whether Keras compiles anew for each number of rows."""
        import keras

        return bool(self.model.jit_compile) and keras.backend.backend() != "torch"


def _for_inference(model: Any) -> Any:
    import keras

    if keras.backend.backend() == "torch":
        model.eval()  # which `predict` does and `predict_on_batch` does not
    return model


_models: OrderedDict[str, Kept] = OrderedDict()
_guard = threading.Lock()


def kept(token: str, raw: bytes) -> Kept:
    """The model of this token in this process, rebuilt from `raw` the first time.

    Raises
    ------
    PlacementError
        If Keras is missing here, or is of another version or backend than where the model came from.
    dask_serializers.CannotMove
        If the model cannot be rebuilt, with the reason: a module that is missing, say.
    """
    with _guard:
        entry = _models.setdefault(token, Kept(len(raw)))
        _models.move_to_end(token)
        while len(_models) > 1 and sum(each.nbytes for each in _models.values()) > max(KEEP, entry.nbytes):
            _models.popitem(last=False)
    return entry.filled(lambda: _rebuilt(raw))


def _rebuilt(raw: bytes) -> Any:
    from dask_serializers.parcel import arrive_nested
    from dask_serializers.standin import StandIn

    header, frames = pickle.loads(raw)
    check_here(header["versions"])
    model = arrive_nested(header, *frames)
    if isinstance(model, StandIn):
        _ = model.name  # raises why
    return model


def check_here(versions: dict[str, str]) -> None:
    """See that this process has the Keras that a model came from.

    Parameters
    ----------
    versions : dict
        "keras" and "backend".

    Raises
    ------
    PlacementError
        Naming this worker and what differs.
    """
    try:
        import keras
    except Exception as error:
        raise PlacementError(
            f"{_here()} cannot import keras ({type(error).__name__}: {error}). "
            "Install it there: pip install 'dask-bridges[keras]'."
        ) from error
    if keras.__version__ != versions["keras"]:
        raise PlacementError(
            f"keras is {keras.__version__} on {_here()} and {versions['keras']} where the model is: "
            "install the same version in both places."
        )
    backend = keras.backend.backend()
    if backend != versions["backend"]:
        raise PlacementError(
            f"keras runs on {backend} on {_here()} and on {versions['backend']} where the model is: "
            "set the environment variable KERAS_BACKEND to the same in both places."
        )


def _here() -> str:
    from distributed import get_worker

    try:
        return f"worker {get_worker().address}"
    except ValueError:
        return "this process"
