"""Header and frames of what we send: one shape for every library, with a version.

The header is plain (msgpack), the frames are raw bytes::

    header  {"protocol": 1, "kind": "keras", "versions": {...}, "arrays": ((dtype, shape), ...), "pickled": bool}
    frames  [description as JSON] [cloudpickled custom objects, if any] [the arrays' bytes, one after the other]

Arrays are cut into frames as it suits the wire: small ones share a frame, large ones are split. The reader takes them
from the stream of frames in order, and lets go of each frame as soon as it is read, so that a state is in memory
once and one frame more.

To change the protocol: raise `PROTOCOL`, keep a reader for the last one if it costs little, and say so in the change
note. A reader that meets another number says which versions both sides have.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

import numpy as np

from dask_serializers.hooks import LIBRARIES
from dask_serializers.memory import Memory
from dask_serializers.standin import CannotMove, StandIn

__all__ = [
    "PROTOCOL",
    "Parcel",
    "Stream",
    "arrive",
    "arrive_nested",
    "as_pickled",
    "failed",
    "is_ours",
    "leave",
    "nbytes",
    "np_dtype",
]

PROTOCOL = 1
SHARD = 2**25  # bytes; under distributed.comm.shard (64 MiB), beyond which Dask would split and join it again
LONGEST = 1000  # characters of one error's text; Keras quotes whole configs
SMALL = 2**16  # bytes; arrays up to this size share frames

Spec = tuple[str, tuple[int, ...]]


@dataclass
class Parcel:
    """An object taken apart: what is sent, and what arrives."""

    #: Which of `LIBRARIES` rebuilds it.
    kind: str
    #: Anything JSON can hold.
    description: Any
    #: Leaving: the arrays, as (dtype, shape, bytes) in the order they are read. Arrived: empty.
    arrays: list[tuple[str, tuple[int, ...], memoryview]] = field(default_factory=list)
    #: Custom objects, by cloudpickle.
    pickled: bytes = b""
    #: Installed versions that matter for rebuilding.
    versions: dict[str, str] = field(default_factory=dict)
    #: Arrived: where the arrays are read from.
    stream: Stream | None = None


class Stream:
    """The arrays of an arrived parcel, read in order; each frame is let go when it is read."""

    def __init__(self, specs: Sequence[Spec], frames: Sequence[Any]) -> None:
        self.specs = [(dtype, tuple(shape)) for dtype, shape in specs]
        #: Arrays read; frames are gone once it is not 0.
        self.reads = 0
        self.memory = Memory(sum(nbytes(dtype, shape) for dtype, shape in self.specs))
        self._frames = list(frames)
        self._at = 0

    def read(self, into: np.ndarray[Any, Any]) -> None:
        """Copy the next ``into.nbytes`` bytes; `into` is flat, of uint8."""
        self.reads += 1
        done = 0
        while done < into.nbytes:
            frame = np.frombuffer(self._frames[0], np.uint8)
            take = min(into.nbytes - done, frame.nbytes - self._at)
            into[done : done + take] = frame[self._at : self._at + take]
            done += take
            self._at += take
            spent = self._at == frame.nbytes
            del frame
            if spent:
                self._let_go()

    def _let_go(self) -> None:
        frame = self._frames.pop(0)
        self._at = 0
        # Dask's own lists hold the frame until the whole message is read: this frees its memory now.
        if isinstance(frame, memoryview):
            frame.release()


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of an array of this dtype and shape."""
    return int(np_dtype(dtype).itemsize * prod(shape))


def np_dtype(name: str) -> Any:
    """NumPy's dtype of this name, bfloat16 and float8 included."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # bfloat16, float8

        return np.dtype(getattr(ml_dtypes, name))


def leave(make: Callable[[], Parcel], what: str) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of the parcel that `make` gives, or of a stand-in that says why there is none.

    Never raises: see :class:`StandIn`.
    """
    try:
        return pack(make())
    except Exception as error:
        return failed(f"{what} cannot be moved: {_told(error)}")


def pack(parcel: Parcel) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of `parcel`; frames alias its arrays."""
    frames: list[Any] = [json.dumps(parcel.description).encode()]
    if parcel.pickled:
        frames.append(parcel.pickled)
    header = {
        "protocol": PROTOCOL,
        "kind": parcel.kind,
        "versions": {"dask-bridges": _version("dask-bridges"), **parcel.versions},
        "arrays": tuple((dtype, tuple(shape)) for dtype, shape, _ in parcel.arrays),
        "pickled": bool(parcel.pickled),
    }
    return header, frames + _cut([data for _, _, data in parcel.arrays])


def _cut(arrays: list[memoryview]) -> list[Any]:
    frames: list[Any] = []
    joined = bytearray()
    for data in arrays:
        if data.nbytes <= SMALL:
            joined += data
        else:
            frames.append(bytes(joined))
            joined = bytearray()
            frames += [data[at : at + SHARD] for at in range(0, data.nbytes, SHARD)]
        if len(joined) >= SHARD:
            frames.append(bytes(joined))
            joined = bytearray()
    return [frame for frame in [*frames, bytes(joined)] if len(frame)]


def failed(reason: str) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames that arrive as a stand-in."""
    return {"protocol": PROTOCOL, "kind": "failed"}, [reason.encode()]


def as_pickled(frames: Sequence[Any], protocol: int) -> list[Any]:
    """Frames as arguments of a reducer: out of band where the pickle protocol can."""
    return [pickle.PickleBuffer(frame) for frame in frames] if protocol >= 5 else [bytes(frame) for frame in frames]


def arrive(header: dict[str, Any], frames: Sequence[Any]) -> Any:
    """Rebuild what arrived by itself, or a stand-in; on a client with no worker beside it, raise instead.

    Dask retries for ever on a worker only. On a client the exception ends ``gather``, which is where the user looks.
    """
    received = arrive_nested(header, *frames)
    if isinstance(received, StandIn) and not _on_a_worker():
        received._fail()
    return received


def is_ours(header: Any) -> bool:
    """Whether a header is one that :func:`pack` or :func:`failed` made."""
    return isinstance(header, dict) and "protocol" in header and header.get("kind") in {*LIBRARIES, "failed"}


def arrive_nested(header: dict[str, Any], *frames: Any) -> Any:
    """Rebuild what arrived inside another object, or a stand-in. Never raises."""
    stream = None
    try:
        if header["protocol"] == PROTOCOL and header["kind"] == "failed":
            return StandIn(bytes(frames[0]).decode())
        parcel = _opened(header, frames)
        stream = parcel.stream
        return import_module(LIBRARIES[parcel.kind]).rebuild(parcel)
    except Exception as error:
        reason = f"An object of kind {header.get('kind')!r} cannot be rebuilt in this process: {_told(error)}"
        whole = stream is None or not stream.reads
        return StandIn(reason, header, frames) if whole else StandIn(reason)


def _opened(header: dict[str, Any], frames: Sequence[Any]) -> Parcel:
    versions = dict(header.get("versions", {}))
    if header["protocol"] != PROTOCOL:
        theirs = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        raise CannotMove(
            f"it was sent with protocol {header['protocol']} ({theirs}); this process reads protocol {PROTOCOL} "
            f"(dask-bridges {_version('dask-bridges')}). Install the same dask-bridges everywhere."
        )
    first = 2 if header["pickled"] else 1
    return Parcel(
        kind=header["kind"],
        description=json.loads(bytes(frames[0])),
        pickled=bytes(frames[1]) if header["pickled"] else b"",
        versions=versions,
        stream=Stream(header["arrays"], frames[first:]),
    )


def _told(error: BaseException) -> str:
    """The error and the first cause of it, in short."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return ". The first cause: ".join(_short(each) for each in dict.fromkeys((chain[0], chain[-1])))


def _short(error: BaseException) -> str:
    text = str(error) if isinstance(error, CannotMove) else f"{type(error).__name__}: {error}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"


def _on_a_worker() -> bool:
    from distributed.core import Status
    from distributed.worker import Worker

    over = (Status.closed, Status.closing, Status.failed)
    return any(worker.status not in over for worker in list(Worker._instances))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
