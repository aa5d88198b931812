"""Batches that `tf.data` reads several at once are those that a rank reads one by one."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_bridges.processes.spool import Spool
from dask_keras.layout import Layout
from dask_keras.rows import Batches, Files, Order
from dask_keras.shares import Shares
from dask_tf.encoding import look, merge, write

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow")

ROWS = 60


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    X, y = np.arange(ROWS * 3, dtype="float32").reshape(ROWS, 3), np.arange(ROWS)
    parts = [{"X": X[at : at + 25], "y": y[at : at + 25]} for at in range(0, ROWS, 25)]
    schema = merge([look(part) for part in parts], ["X", "y"])
    with Spool("feeds", budget=lambda: 2**20, overflow=tempfile.gettempdir()) as spool:
        with spool.writer("train") as writer:
            write(parts, schema, writer)
        yield Files(Path(spool.path) / "train", schema)


def read(batches: Any) -> list[tuple[Any, Any]]:
    return [(np.asarray(x), np.asarray(y)) for x, y in batches]


@settings(max_examples=30, deadline=None)
@given(
    others=st.sampled_from([(), (ROWS,), (ROWS, ROWS), (7,), (1, 200)]),
    batch_size=st.sampled_from([1, 4, 8, 20, 30, 90, 1000]),
    first=st.integers(0, 9),
    steps=st.integers(1, 25),
    shuffle=st.booleans(),
)
def test_steps_that_are_read_together_have_the_rows_of_each(
    files: Files, others: tuple[int, ...], batch_size: int, first: int, steps: int, shuffle: bool
) -> None:
    from dask_keras import feeds

    rank, shares = len(others), Shares((*others, ROWS), batch_size)

    def batches() -> Batches:
        return Batches(files, Layout("X", "y"), shares, Order(shuffle, seed=3, rank=rank))

    one_by_one, numbers = batches(), range(first, first + steps)
    expected = [one_by_one[step] for step in numbers]
    assert [len(y) for _, y in expected] == [shares.of_step(step)[rank] or 1 for step in numbers]
    found = read(itertools.islice(feeds.endless(batches(), first), steps))
    if not first:
        found_once = read(feeds.once(batches(), steps))
        np.testing.assert_equal(found_once, found)
    np.testing.assert_equal(found, expected)
