"""What a rank is told of a matrix, to build its part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Worker

__all__ = ["MatrixOptions", "MatrixSpec"]


@dataclass(frozen=True)
class MatrixOptions:
    """What belongs to a matrix as a whole; see `DMatrix`."""

    feature_weights: Any = None
    feature_names: Sequence[str] | None = None
    feature_types: Sequence[str] | None = None
    missing: float = float("nan")
    enable_categorical: bool = True
    external_memory: bool | str = False


@dataclass(frozen=True)
class MatrixSpec:
    """What one rank needs to build its part of a matrix.

    Attributes
    ----------
    keys : tuple
        Of the parts in the worker's store, in order; for a child process, `Inputs` of one part each.
    columns : tuple of (str, str)
        Fields that are columns of X.
    categories : dict
        The categories all partitions agree on, by column.
    num_features : int
    feature_names, feature_types : list of str or None
    options : MatrixOptions
    held : str or None
        Key of what was built of it before, see `resident`.
    token : str or None
        Under which it is left to the client if it is built.
    released : bool
        Whether the parts need not be there.
    """

    keys: tuple[Any, ...]
    columns: tuple[tuple[str, str], ...]
    categories: dict[str, Any]
    num_features: int
    feature_names: list[str] | None
    feature_types: list[str] | None
    options: MatrixOptions
    held: str | None = None
    token: str | None = None
    released: bool = False

    def there(self, worker: Worker) -> bool:
        """Whether the parts are there to build it from."""
        return not self.released and all(key in worker.data for key in self.keys)
