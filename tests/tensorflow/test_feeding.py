"""Dask collections arrive whole in the processes of tasks, each from its own machine, and leave no copy behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_bridges import DataError
from dask_tf import start_tensorflow

pytestmark = pytest.mark.cluster


# What tasks do


def everything(cluster: Any, name: str) -> list[Any]:
    """All batches of this task, as numpy."""
    return list(cluster.dataset(name, 7).as_numpy_iterator())


def graph_of(cluster: Any, name: str) -> str:
    """Of a task that holds no rows: elements as its graph has them."""
    return str(cluster.dataset(name, 7).element_spec)


def files(cluster: Any, name: str) -> list[str]:
    return os.listdir(cluster.folder(name))


def feeds_of(cluster: Any) -> list[str]:
    return sorted(cluster.feeds)


# Helpers


@pytest.fixture
def cluster(tensorflow_cluster: Any) -> Iterator[Any]:
    """The shared cluster; afterwards without feeds, and Dask holds nothing."""
    yield tensorflow_cluster
    for name in list(tensorflow_cluster.feeds):
        tensorflow_cluster.unfeed(name)
    client = tensorflow_cluster.client
    client.sync(until_free, client)


async def until_free(client: Client) -> None:
    """Wait until Dask holds nothing anywhere."""
    deadline = time.monotonic() + 20
    while held := {key: where for key, where in (await client.scheduler.who_has()).items() if where}:
        assert time.monotonic() < deadline, held


def gathered(cluster: Any, name: str, role: str = "worker") -> list[Any]:
    """The batches of all tasks of a role."""
    found: list[list[Any]] = cluster.client.gather(cluster.run(role, everything, cluster, name))
    return [batch for batches in found for batch in batches]


def numbered(rows: int, *shape: int) -> np.ndarray:
    """Rows of that shape whose first value is their number."""
    size = int(np.prod(shape, dtype=int))
    return np.arange(rows * size, dtype="float32").reshape(rows, *shape)


def in_order(rows: np.ndarray) -> np.ndarray:
    flat = rows.reshape(len(rows), -1)
    return rows[np.argsort(flat[:, 0])]


# Collections


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 2)], ids=["rank 1", "rank 2", "rank 3", "rank 4"])
def test_arrays_of_any_rank_arrive_row_for_row(cluster: Any, shape: tuple[int, ...]) -> None:
    rows = numbered(100, *shape)
    X = da.from_array(rows, chunks=(17, *shape))
    y = da.from_array(np.arange(100), chunks=17)
    feed = cluster.feed(X, y)
    assert sum(feed.rows.values()) == 100
    assert set(feed.rows) == {"worker:0", "worker:1"}
    assert min(feed.rows.values()) > 0
    batches = gathered(cluster, "train")
    numbers = np.concatenate([y for _, y in batches])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(100))
    np.testing.assert_array_equal(np.concatenate([X for X, _ in batches]), rows[numbers])


def test_dataframes_arrive_with_text_categories_and_nulls(cluster: Any) -> None:
    frame = pd.DataFrame(
        {
            "number": np.arange(40),
            "text": ["b", "a", None, "c"] * 10,
            "kind": pd.Categorical(["y", "x"] * 20, categories=["y", "x", "z"]),
            "nullable": pd.array([1, None, 3, 4] * 10, dtype="Int32"),
        }
    )
    feed = cluster.feed(dd.from_pandas(frame, npartitions=5), name="frame")
    assert feed.schema.vocabulary("text") == ["a", "b", "c"]
    assert feed.schema.vocabulary("kind") == ["y", "x", "z"]
    batches = gathered(cluster, "frame")
    found = pd.DataFrame({name: np.concatenate([b[name] for b in batches]) for name in frame}).sort_values("number")
    assert found["number"].tolist() == list(range(40))
    assert [["a", "b", "c", None][at] for at in found["text"]] == ["b", "a", None, "c"] * 10
    assert found["kind"].tolist() == [0, 1] * 20
    np.testing.assert_array_equal(found["nullable"], [1, np.nan, 3, 4] * 10)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(sum))
def test_unequal_and_empty_partitions_lose_and_repeat_no_row(tensorflow_cluster: Any, layout: list[int]) -> None:
    cluster = tensorflow_cluster
    rows = numbered(sum(layout), 2)
    feed = cluster.feed(da.from_array(rows, chunks=(tuple(layout), 2)), name="layout")
    try:
        assert sum(feed.rows.values()) == len(rows)
        batches = gathered(cluster, "layout")
        np.testing.assert_array_equal(in_order(np.concatenate(batches)), rows)
    finally:
        cluster.unfeed("layout")


def test_more_arrives_under_other_names_while_the_cluster_runs(cluster: Any) -> None:
    cluster.feed(da.ones((20, 2), chunks=(5, 2)), name="train")
    cluster.feed(da.zeros((30, 3), chunks=(7, 3)), name="validation")
    assert {name: sum(feed.rows.values()) for name, feed in cluster.feeds.items()} == {"train": 20, "validation": 30}
    assert sum(len(batch) for batch in gathered(cluster, "validation")) == 30
    assert sum(batch.sum() for batch in gathered(cluster, "train")) == 40


# Names and receivers


def test_a_name_is_taken_until_it_is_unfed(cluster: Any) -> None:
    ones, twos = da.ones((20, 2), chunks=(5, 2)), da.full((10, 2), 2.0, chunks=(5, 2))
    cluster.feed(ones)
    with pytest.raises(DataError, match=r"'train' already.*unfeed"):
        cluster.feed(twos)
    cluster.unfeed("train")
    assert cluster.feeds == {}
    [gone] = cluster.run("worker:0", everything, cluster, "train")
    with pytest.raises(DataError, match="nothing was fed under the name 'train'"):
        gone.result()
    cluster.feed(twos)
    assert sum(batch.sum() for batch in gathered(cluster, "train")) == 40


def test_what_was_not_fed_cannot_be_unfed(cluster: Any) -> None:
    with pytest.raises(DataError, match="nothing was fed under the name 'nothing'"):
        cluster.unfeed("nothing")


def test_rows_go_where_they_are_sent(cluster: Any) -> None:
    X = da.from_array(numbered(30, 2), chunks=(4, 2))
    assert cluster.feed(X, name="one", to="worker:1").rows == {"worker:1": 30}
    assert cluster.feed(X, name="servers", to="ps").rows == {"ps:0": 30}
    both = cluster.feed(X, name="both", to=["ps", "worker:0"])
    assert set(both.rows) == {"ps:0", "worker:0"}
    assert len(np.concatenate(gathered(cluster, "one", "worker:1"))) == 30
    assert len(np.concatenate(gathered(cluster, "servers", "ps"))) == 30
    with pytest.raises(ValueError, match="no task 'baker'"):
        cluster.feed(X, name="nobody", to="baker")


def test_tasks_that_hold_no_rows_know_of_the_feed_and_can_build_its_graph(cluster: Any) -> None:
    cluster.feed(da.ones((20, 2), chunks=(5, 2)), da.ones(20, chunks=5))
    [names] = cluster.client.gather(cluster.run("ps", feeds_of, cluster))
    assert names == ["train"]
    [spec] = cluster.client.gather(cluster.run("ps", graph_of, cluster, "train"))
    assert spec.count("shape=(None, 2)") == 1
    assert spec.count("shape=(None,)") == 1


# Copies


def stored(client: Client) -> int:
    """Partitions that the workers hold in their memory."""
    found: dict[str, int] = client.run(_stored_here)
    return sum(found.values())


def _stored_here(dask_worker: Any) -> int:
    return sum(isinstance(value, np.ndarray | dict) for value in dask_worker.data.values())


def test_dask_lets_go_of_its_copies_unless_they_are_to_be_kept(cluster: Any) -> None:
    client = cluster.client
    X = da.random.default_rng(1).random((60, 2), chunks=(10, 2))
    cluster.feed(X, name="moved")
    client.sync(until_free, client)
    assert stored(client) == 0
    cluster.feed(X, name="kept", keep=True)
    assert stored(client) == 6
    cluster.unfeed("kept")
    client.sync(until_free, client)
    assert stored(client) == 0


def test_what_the_caller_has_persisted_stays(cluster: Any) -> None:
    client = cluster.client
    X = client.persist(da.ones((60, 2), chunks=(10, 2)))
    cluster.feed(X)
    assert stored(client) == 6
    np.testing.assert_array_equal(client.compute(X).result(), np.ones((60, 2)))


# Failures


def test_a_feed_that_fails_leaves_nothing_and_its_name_is_free(cluster: Any) -> None:
    X = da.ones((20, 2), chunks=(5, 2))
    broken = X.map_blocks(_fail_on_third, dtype=X.dtype, meta=X._meta)
    with pytest.raises(DataError, match="partition 2 of X could not be computed: LookupError: third"):
        cluster.feed(broken)
    with pytest.raises(DataError, match="20 rows and y has 10"):
        cluster.feed(X, da.ones(10, chunks=5))
    with pytest.raises(DataError, match="dtype datetime64"):
        cluster.feed(da.zeros(10, dtype="M8[s]", chunks=5))
    assert cluster.feeds == {}
    assert cluster.client.gather(cluster.run("worker", feeds_of, cluster)) == [[], []]
    assert sum(cluster.feed(X).rows.values()) == 20


def _fail_on_third(block: Any, block_info: Any = None) -> Any:
    if block_info and block_info[0]["chunk-location"][0] == 2:
        raise LookupError("third")
    return block


# Sharing


def test_tasks_that_share_a_dask_worker_divide_its_rows(cluster: Any) -> None:
    one = sorted(cluster.client.scheduler_info(n_workers=-1)["workers"])[:1]
    with start_tensorflow(cluster.client, worker=2, share=True, workers=one) as sharing:
        feed = sharing.feed(da.from_array(numbered(100, 2), chunks=(9, 2)))
        assert sorted(feed.rows) == ["worker:0", "worker:1"]
        assert abs(feed.rows["worker:0"] - feed.rows["worker:1"]) <= 9
        rows = np.concatenate(gathered(sharing, "train"))
        np.testing.assert_array_equal(in_order(rows), numbered(100, 2))
