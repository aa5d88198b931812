"""The rows of a rank, read from the files beside it in passes, as the batches that a model takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dask_keras.layout import Layout
from dask_keras.shares import Shares
from dask_tf.schema import Block, Schema

__all__ = ["Batches", "Files"]

#: Rows are mixed within windows of at least so many bytes, or this share of all.
_LEAST_WINDOW, _MOST_WINDOW, _WINDOW_SHARE = 4 * 2**20, 32 * 2**20, 20
#: Files that are kept mapped; the kernel allows a process 65,530.
_MAPPED = 20_000

#: The blocks of some rows.
Blocks = tuple[Any, ...]


class Files:
    """The files of one feed.

    Parameters
    ----------
    folder : str or Path
    schema : Schema
    """

    def __init__(self, folder: str | Path, schema: Schema) -> None:
        self.folder = Path(folder)
        self.schema = schema
        self.rows: list[int] = np.fromfile(self.folder / "rows", "<i8").tolist()
        self.chunk = functools.lru_cache(_MAPPED)(self._chunk)

    def __len__(self) -> int:
        return sum(self.rows)

    def _chunk(self, number: int) -> Blocks:
        """The blocks of a chunk, mapped."""
        rows = self.rows[number]
        return tuple(
            _mapped(self.folder / f"{number}.{at}", block, rows) for at, block in enumerate(self.schema.blocks)
        )

    def first(self) -> Blocks:
        """The blocks of one row."""
        number = next(number for number, rows in enumerate(self.rows) if rows)
        return tuple(block[:1] for block in self.chunk(number))

    def windows(self, generator: np.random.Generator | None) -> Iterator[Blocks]:
        """All rows, in windows; with a generator chunks in a random order, and rows within windows of several."""
        if generator is None:
            yield from map(self.chunk, range(len(self.rows)))
            return
        waiting: list[int] = []
        for number in generator.permutation(len(self.rows)):
            waiting.append(int(number))
            if sum(self.rows[each] for each in waiting) >= self._window_rows:
                yield self._mixed(waiting, generator)
                waiting = []
        if waiting:
            yield self._mixed(waiting, generator)

    @functools.cached_property
    def _window_rows(self) -> int:
        row_bytes = max(1, self.schema.row_bytes)
        return min(max(len(self) // _WINDOW_SHARE, _LEAST_WINDOW // row_bytes, 1), max(1, _MOST_WINDOW // row_bytes))

    def _mixed(self, numbers: Sequence[int], generator: np.random.Generator) -> Blocks:
        chunks = [self.chunk(number) for number in numbers]
        order = generator.permutation(sum(self.rows[number] for number in numbers))
        return tuple(np.concatenate(blocks).take(order, axis=0) for blocks in zip(*chunks))


def _mapped(path: Path, block: Block, rows: int) -> Any:
    dtype = _dtype(block.dtype)
    if not rows or not block.width:
        return np.empty((rows, block.width), dtype)
    return np.memmap(path, dtype, "r", shape=(rows, block.width)).view(np.ndarray)  # which is cut faster


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


@dataclass(frozen=True)
class Order:
    """In which order the rows come.

    Attributes
    ----------
    shuffle : bool
    seed : int
        Each pass and each rank has an order of its own by it.
    rank : int
    """

    shuffle: bool = False
    seed: int = 0
    rank: int = 0

    def of_pass(self, number: int) -> np.random.Generator | None:
        """Who mixes the rows in a pass."""
        return np.random.default_rng([self.seed, self.rank, number]) if self.shuffle else None


class Batches:
    """The batches of a rank by the number of their step, read one after another.

    Parameters
    ----------
    files : Files
    layout : Layout
        What the model takes.
    shares : Shares
        Rows of each rank in each step.
    order : Order

    Notes
    -----
    Where a rank has no row in a step it gets one nevertheless, since not every layer bears a batch without
    rows: whoever trains on it gives it no weight.
    """

    def __init__(self, files: Files, layout: Layout, shares: Shares, order: Order) -> None:
        self.files = files
        self.shares = shares
        self.order = order
        self._element: Callable[[Blocks], Any] = functools.partial(layout.element, files.schema)
        self._next = -1
        self._pass: Iterator[Blocks] = iter(())
        self._window: Blocks = ()
        self._left = self._at = 0

    def __getitem__(self, step: int) -> Any:
        """The batch of a step; the next one is the quickest to get."""
        return self.together(step, 1)[1]

    def together(self, step: int, most: int) -> tuple[int, Any]:
        """Some steps from one on that have as many rows each: how many they are, and all of their rows.

        Parameters
        ----------
        step : int
        most : int
            Steps, at most; all are of one pass.
        """
        if step != self._next or step % self.shares.steps == 0:
            self._seek(step)
        count, steps = self.shares.of_rank(self.order.rank, step)
        steps = min(steps, most) if count else 1
        self._next = step + steps
        return steps, self._element(self._take(count * steps) if count else self.files.first())

    def _seek(self, step: int) -> None:
        number, taken = self.shares.before(step)
        self._pass = self.files.windows(self.order.of_pass(number))
        self._window, self._left, self._at = (), 0, 0
        self._skip(taken[self.order.rank])

    def _skip(self, count: int) -> None:
        while count:
            some = min(count, self._available())
            self._at, self._left, count = self._at + some, self._left - some, count - some

    def _available(self) -> int:
        """Rows of the present window that are left; of the next one where none are."""
        while not self._left:
            self._window = next(self._pass)
            self._left, self._at = len(self._window[0]), 0
        return self._left

    def _take(self, count: int) -> Blocks:
        pieces: list[Blocks] = []
        while count:
            some = min(count, self._available())
            pieces.append(tuple(block[self._at : self._at + some] for block in self._window))
            self._at, self._left, count = self._at + some, self._left - some, count - some
        return pieces[0] if len(pieces) == 1 else tuple(np.concatenate(blocks) for blocks in zip(*pieces))
