"""Arrays as bytes, and what a training resumes from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from dask_bridges.errors import DataError

__all__ = ["Checkpoints", "Position", "arrays", "dump", "load", "save"]

FILE = "variables.npz"


class Checkpoints(Protocol):
    """What is asked of ``dask_bridges.checkpoints.Checkpoints``."""

    def save(self, step: int, files: dict[str, bytes], meta: dict[str, Any]) -> Any:
        """Keep a checkpoint, whole or not at all."""

    def load(self, step: int | None = None) -> Any:
        """The newest one, or that of `step`."""

    def latest(self) -> int | None:
        """Number of the newest one, None where there is none."""


@dataclass
class Position:
    """How far a training is.

    Attributes
    ----------
    epoch : int
        The epoch that is under way or comes next.
    step : int
        Steps of it that are over.
    steps : int
        All steps so far.
    repeated : int
        How many of them were done twice, after a worker was lost.
    history : dict of str to list of float
        Values of each epoch so far.
    epochs : list of int
        Those epochs.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    repeated: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)


def dump(values: Sequence[np.ndarray[Any, Any]]) -> bytes:
    """Arrays as bytes without pickle; the dtypes NumPy lacks (bfloat16, float8) as plain bytes of their width."""
    stream = io.BytesIO()
    plain = {f"{n}": v if v.dtype.isbuiltin == 1 else v.view(f"V{v.dtype.itemsize}") for n, v in enumerate(values)}
    np.savez(stream, allow_pickle=False, **plain)
    return stream.getvalue()


def arrays(data: bytes) -> list[np.ndarray[Any, Any]]:
    """Undo :func:`dump`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        return [kept[f"{n}"] for n in range(len(kept.files))]


def save(checkpoints: Checkpoints, variables: Sequence[Any], position: Position) -> None:
    """Keep the values of `variables` (Keras's or TensorFlow's, local) and how far the training is."""
    values = [np.asarray(v.numpy()) for v in variables]
    meta = {**asdict(position), "variables": [[v.name, list(v.shape)] for v in variables]}
    checkpoints.save(position.steps, {FILE: dump(values)}, meta)


def load(checkpoints: Checkpoints | None, variables: Sequence[Any]) -> Position | None:
    """Give `variables` the values of the newest checkpoint; None where there is none.

    Raises
    ------
    DataError
        The checkpoint is of another model.
    """
    if checkpoints is None or checkpoints.latest() is None:
        return None
    kept = checkpoints.load()
    values = arrays(kept.files[FILE])
    meta = dict(kept.meta)
    shapes = [shape for _, shape in meta.pop("variables")]
    own = [list(v.shape) for v in variables]
    if shapes != own:
        raise DataError(
            f"the checkpoint of step {kept.step} is of another model or optimizer: it has {len(shapes)} variables, "
            f"this one {len(own)}, or their shapes differ. Use another folder, or fit the model it is of"
        )
    for variable, value in zip(variables, values, strict=True):
        dtype = np.asarray(variable.numpy()).dtype
        variable.assign(value.view(dtype) if value.dtype.kind == "V" else value)
    return Position(**meta)
