"""The folds of a cross-validation, as a rank is told of them: which rows each booster sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Block", "Folds", "masks"]


@dataclass(frozen=True)
class Block:
    """Where the rows of a partition are among all.

    Attributes
    ----------
    part : int
    start, stop : int
        Of its rows, or of its query groups.
    """

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Folds:
    """What a rank is told of the folds.

    Attributes
    ----------
    params : tuple of dict
        Sets of parameters, one after the other.
    number : int
    rows : int
        Of all ranks; or query groups.
    blocks : tuple of Block
        Of this rank.
    stratified, shuffle : bool
    seed : int
    given : tuple of (bytes, bytes), optional
        The rows of this rank that each booster sees, and those it is evaluated on, as packed bits; or groups.
    grouped : bool
        Whether whole query groups are dealt out.
    """

    params: tuple[dict[str, Any], ...]
    number: int
    rows: int
    blocks: tuple[Block, ...]
    stratified: bool = False
    shuffle: bool = True
    seed: int = 0
    given: tuple[tuple[bytes, bytes], ...] = ()
    grouped: bool = False


def masks(folds: Folds, labels: Any) -> list[tuple[Any, Any]]:
    """For each booster, which rows of this rank it sees, and which it is evaluated on; or which query groups.

    They do not depend on where partitions lie.
    """
    total = sum(block.stop - block.start for block in folds.blocks)
    if folds.given:
        return [(_unpacked(train, total), _unpacked(test, total)) for train, test in folds.given]
    numbers, done = [np.empty(0, "int64")], 0
    for block in folds.blocks:
        rows = block.stop - block.start
        numbers.append(_numbers(folds, block, np.asarray(labels)[done : done + rows]))
        done += rows
    fold = np.concatenate(numbers)
    return [(fold != number, fold == number) for number in range(folds.number)]


def _unpacked(bits: bytes, rows: int) -> Any:
    return np.unpackbits(np.frombuffer(bits, dtype="uint8"), count=rows).astype(bool)


def _numbers(folds: Folds, block: Block, labels: Any) -> Any:
    """The fold of each row of a block."""
    positions = np.arange(block.start, block.stop)
    if not folds.shuffle and not folds.stratified:
        return positions * folds.number // folds.rows
    random = np.random.default_rng([folds.seed, block.part])
    order = random.permutation(len(positions)) if folds.shuffle else np.arange(len(positions))
    fold = np.empty(len(positions), dtype="int64")
    if not folds.stratified:
        fold[order] = positions % folds.number
        return fold
    first = random.integers(folds.number)  # a class of one row a block is not in the same fold everywhere
    for label in np.unique(labels):
        alike = order[labels[order] == label]
        fold[alike] = (first + np.arange(len(alike))) % folds.number
        first += len(alike)
    return fold
