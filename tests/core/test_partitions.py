"""From collections to the parts that each worker holds."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from dask._task_spec import Alias, Task
from distributed import Client, LocalCluster
from distributed.core import Status
from hypothesis import given
from hypothesis import strategies as st

from dask_bridges import DataError, PlacementError, config, partitions
from dask_bridges.partitions import Partitions, assign
from dask_bridges.shipping import sealed
from dask_bridges.task import WorkerMember
from dask_bridges.testing import loopback

WORKERS = ["a", "b", "c", "d", "e"]


def load(client: Client, collections: dict[str, Any], spread: Any = (), **options: Any) -> Partitions:
    """What a bridge does: prepare, load, and spread over the workers given."""
    prepared = partitions.prepare(client, collections)

    async def run() -> Partitions:
        parts = await partitions.load(client, prepared, **options)
        if spread:
            await parts.spread(client, spread)
        return parts

    return client.sync(run)


def blocks(client: Client, parts: Partitions, role: str) -> list[Any]:
    return [part[role] for part in client.gather(parts.futures)]


# Balance


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[int], list[str], list[str]]:
    """Rows of each part, the one worker that holds each, and the workers there are."""
    workers = WORKERS[: draw(st.integers(1, 5))]
    rows = draw(st.lists(st.integers(0, 200), max_size=25))
    holders = draw(st.lists(st.sampled_from(workers), min_size=len(rows), max_size=len(rows)))
    return rows, holders, workers


def loads(rows: list[int], chosen: list[str], workers: list[str]) -> dict[str, int]:
    return {worker: sum(r for r, where in zip(rows, chosen) if where == worker) for worker in workers}


@given(clusters(), st.floats(0, 1))
def test_spreading_is_never_worse_than_leaving_all_parts_where_they_are(
    cluster: tuple[list[int], list[str], list[str]], tolerance: float
) -> None:
    rows, holders, workers = cluster
    chosen = assign(rows, [[holder] for holder in holders], workers, tolerance)
    before, after = loads(rows, holders, workers), loads(rows, chosen, workers)
    limit = (1 + tolerance) * sum(rows) / len(workers)
    assert max(after.values()) <= max(before.values())
    assert max(after.values()) <= max(limit, sum(rows) / len(workers) + max(rows, default=0))
    if max(before.values()) <= limit:
        assert chosen == holders


@given(clusters(), st.lists(st.sets(st.sampled_from([*WORKERS, "gone"])), min_size=25, max_size=25))
def test_every_part_gets_one_allowed_worker_wherever_it_is_held(
    cluster: tuple[list[int], list[str], list[str]], holders: list[set[str]]
) -> None:
    rows, _, workers = cluster
    chosen = assign(rows, holders[: len(rows)], workers)
    assert len(chosen) == len(rows)
    assert set(chosen) <= set(workers)


@given(clusters())
def test_everywhere_leaves_no_worker_without_rows_if_there_are_parts_enough(
    cluster: tuple[list[int], list[str], list[str]],
) -> None:
    rows, holders, workers = cluster
    plain = loads(rows, assign(rows, [[h] for h in holders], workers), workers)
    everywhere = loads(rows, assign(rows, [[h] for h in holders], workers, everywhere=True), workers)
    filled = sum(1 for r in rows if r)
    assert sum(1 for held in everywhere.values() if held) >= min(filled, len(workers))
    assert max(everywhere.values()) <= max(plain.values())


def test_many_parts_on_one_worker_are_spread_evenly() -> None:
    workers = [f"worker-{number}" for number in range(100)]
    chosen = assign([10] * 10_000, [workers[:1]] * 10_000, workers, tolerance=0)
    assert set(loads([10] * 10_000, chosen, workers).values()) == {1000}


# Read once


def noted(log: Path, index: int) -> pd.DataFrame:
    """A partition whose every read is noted."""
    with log.open("a") as file:
        file.write("x")
    return pd.DataFrame({"a": np.arange(5) + 5 * index, "y": 1.0, "w": 2.0})


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """A dataframe of 8 partitions, and a function that counts their reads."""
    log = tmp_path / "reads"
    frame = dd.from_map(lambda index: noted(log, index), range(8), meta=noted(log, 0))
    log.unlink()
    return frame, lambda: len(log.read_text())


def test_frames_of_one_source_read_it_once(client: Client, source: Any) -> None:
    frame, reads = source
    parts = load(client, {"X": frame[["a"]], "y": frame["y"], "weight": frame["w"]})
    assert reads() == 8
    assert parts.rows == [5] * 8


def test_arrays_of_one_source_read_it_once(client: Client, source: Any) -> None:
    frame, reads = source
    array = frame.to_dask_array(lengths=[5] * 8)
    parts = load(client, {"X": array[:, :1], "y": array[:, 1], "weight": array[:, 2]})
    assert reads() == 8
    assert parts.rows == [5] * 8


MADE: dict[str, Callable[[Any], Any]] = {
    "plain": lambda frame: frame,
    "rows by label": lambda frame: frame.loc[12:33],
    "some labels": lambda frame: frame.loc[[3, 17, 30]],
    "partitions in another order": lambda frame: frame.partitions[[5, 2, 3]],
    "rows by value": lambda frame: frame[frame.a % 3 > 0],
    "other partitions": lambda frame: frame.repartition(npartitions=3),
    "twice": lambda frame: dd.concat([frame, frame]),
}


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("persisted", [False, True], ids=["lazy", "persisted"])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_rows_of_frames_come_in_their_order(client: Client, make: Any, persisted: bool, sets: int) -> None:
    source = dd.from_pandas(pd.DataFrame({"a": np.arange(40.0), "y": np.arange(40.0) * 2}), npartitions=8)
    frame = make(client.persist(source) if persisted else source)
    each = [{"X": frame[["a"]], "y": frame["y"]} for _ in range(sets)]

    async def run() -> list[Partitions]:
        return await partitions.load_all(client, [(one, None) for one in partitions.prepare_all(client, each)])

    expected = make(source).compute(scheduler="sync")
    for parts in client.sync(run):
        np.testing.assert_array_equal(np.concatenate([b["a"] for b in blocks(client, parts, "X")]), expected["a"])
        np.testing.assert_array_equal(np.concatenate(blocks(client, parts, "y")), expected["y"])


@pytest.mark.parametrize("sets", [1, 2])
def test_a_partition_of_frames_takes_one_task_and_with_several_sets_one_for_each(client: Client, sets: int) -> None:
    source = dd.from_pandas(pd.DataFrame({"a": np.arange(40.0), "y": np.arange(40.0)}), npartitions=8)
    held = client.persist(source)
    given = [(client.persist(held[["a"]] + number), client.persist(held["y"] + number)) for number in range(sets)]
    if sets == 1:  # of several sets nothing is fused, since each would read what they share
        given += [(source[["a"]] + 1, source["y"]), (held[["a"]], held["y"])]
    for some in [given] if sets > 1 else [[one] for one in given]:
        graph = partitions.prepare_all(client, [{"X": X, "y": y} for X, y in some])[0].graph
        assert sum(isinstance(node, Task | Alias) for node in graph.values()) == 8 * sets


# Alignment


def test_chunks_are_cut_like_those_of_the_first(client: Client) -> None:
    X, y = da.from_array(np.arange(60).reshape(20, 3), chunks=(6, 2)), da.from_array(np.arange(20) * 3, chunks=7)
    parts = load(client, {"X": X, "y": y})
    assert parts.rows == [6, 6, 6, 2]
    for x_block, y_block in zip(blocks(client, parts, "X"), blocks(client, parts, "y")):
        assert x_block.shape[1] == 3
        np.testing.assert_array_equal(x_block[:, 0], y_block)


def test_frames_are_matched_by_their_known_divisions(client: Client) -> None:
    table = pd.DataFrame({"a": np.arange(40.0)})
    X = dd.from_pandas(table, npartitions=4)
    for divisions in ([0, 5, 39], [0, 7, 15, 31, 39]):
        parts = load(client, {"X": X, "y": dd.from_pandas(table["a"], npartitions=1).repartition(divisions=divisions)})
        for x_block, y_block in zip(blocks(client, parts, "X"), blocks(client, parts, "y")):
            np.testing.assert_array_equal(x_block["a"], y_block)


def test_frames_with_other_indices_and_equal_partitions_are_matched_by_position(client: Client) -> None:
    X = dd.from_pandas(pd.DataFrame({"a": np.arange(40.0)}), npartitions=4)
    y = dd.from_pandas(pd.Series(np.arange(40.0), index=np.arange(1000, 1040)), npartitions=4)
    parts = load(client, {"X": X, "y": y})
    assert [list(block) for block in blocks(client, parts, "y")] == [list(b["a"]) for b in blocks(client, parts, "X")]


def test_frames_that_cannot_be_matched_are_refused_with_both_indices(client: Client) -> None:
    table = pd.DataFrame({"a": np.arange(40.0)})
    X, y = dd.from_pandas(table, npartitions=4), dd.from_pandas(table["a"].iloc[:30], npartitions=3)
    with pytest.raises(DataError, match="X runs from 0 to 39 in 4 partitions and that of y from 0 to 29 in 3"):
        partitions.prepare(client, {"X": X, "y": y})


def unknown(array: Any) -> Any:
    """The same array, its chunk sizes not known before it is computed."""
    return array[da.ones(len(array), chunks=array.chunks[0], dtype=bool)]


def test_unknown_chunk_sizes_are_found_out(client: Client) -> None:
    array = da.from_array(np.arange(20.0), chunks=6)
    parts = load(client, {"X": unknown(array), "y": array})
    assert parts.rows == [6, 6, 6, 2]
    np.testing.assert_array_equal(np.concatenate(blocks(client, parts, "X")), np.arange(20.0))


def test_known_lengths_that_differ_are_told_before_anything_is_computed(client: Client) -> None:
    X, y = da.ones((240, 3), chunks=(30, 3)), da.ones(210, chunks=30)
    with pytest.raises(DataError, match="X has 240 rows and y has 210"):
        partitions.prepare(client, {"X": X, "y": y})


def test_unknown_lengths_that_differ_are_told_with_partition_and_both_lengths(client: Client) -> None:
    X, y = unknown(da.ones((20, 2), chunks=(5, 2))), unknown(da.ones(19, chunks=(5, 5, 4, 5)))
    with pytest.raises(DataError, match="X has 20 rows and y has 19; partition 2 holds 5 rows of X and 4 of y"):
        load(client, {"X": X, "y": y})
    assert client.futures == {}


def test_unknown_lengths_in_other_numbers_of_partitions_are_refused(client: Client) -> None:
    X, y = unknown(da.ones((20, 2), chunks=(5, 2))), unknown(da.ones(20, chunks=10))
    with pytest.raises(DataError, match="X has 4 partitions and y has 2, of unknown lengths"):
        partitions.prepare(client, {"X": X, "y": y})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (np.ones(20), "y is a numpy ndarray, not a Dask collection"),
        ([1, 2], "y is a builtins list, not a Dask collection"),
        (da.ones(20, chunks=5).sum(), "y is a scalar"),
    ],
)
def test_what_is_no_collection_of_rows_is_refused(client: Client, what: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partitions.prepare(client, {"X": da.ones((20, 2), chunks=(5, 2)), "y": what})


def test_sparse_chunks_stay_sparse(client: Client) -> None:
    dense = np.eye(20, 4)
    X = da.from_array(dense, chunks=(6, 4)).map_blocks(sp.csr_matrix)
    parts = load(client, {"X": X, "y": da.ones(20, chunks=5)})
    assert parts.rows == [6, 6, 6, 2]
    assert all(isinstance(block, sp.csr_matrix) for block in blocks(client, parts, "X"))
    np.testing.assert_array_equal(sp.vstack(blocks(client, parts, "X")).toarray(), dense)


def test_empty_partitions_are_ordinary(client: Client) -> None:
    parts = load(client, {"X": da.ones((20, 2), chunks=((0, 8, 0, 12), 2)), "y": da.ones(20, chunks=20)})
    assert parts.rows == [0, 8, 0, 12]
    assert parts.filled() == [1, 3]


# A function of the rows


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_function_of_rows_gets_the_blocks_themselves_and_gives_a_lazy_array(ndim: int) -> None:
    held = np.arange(24.0).reshape([(24,), (6, 4), (6, 2, 2)][ndim - 1])
    X = da.from_delayed(dask.delayed(lambda: held, pure=False)(), held.shape, held.dtype)
    y = da.ones((len(held), 2), chunks=(len(held), 2))
    seen = []

    def both(x_block: Any, y_block: Any, *, scale: float) -> Any:
        seen.append(x_block)
        return np.stack([x_block.reshape(len(x_block), -1).sum(axis=1) * scale, y_block.sum(axis=1)], axis=1)

    found = partitions.map_rows(sealed(both), [X, y], (2,), "float64", name="both", scale=dask.delayed(10))
    assert found.chunks == ((len(held),), (2,))
    assert seen == []
    np.testing.assert_array_equal(found.compute(scheduler="sync"), both(held, np.ones((len(held), 2)), scale=10))
    assert seen[0] is held


# Failures


def fail_on_second(block: Any, block_info: Any = None) -> Any:
    if block_info and block_info[0]["chunk-location"][0] == 2:
        raise ZeroDivisionError("deliberate")
    return block


def die_on_second(block: Any, block_info: Any = None) -> Any:
    if block_info and block_info[0]["chunk-location"][0] == 2:
        os._exit(1)
    return block


def test_a_partition_that_raises_is_named_and_the_others_do_not_stay(client: Client) -> None:
    X, y = (
        da.ones((20, 2), chunks=(5, 2)),
        da.ones(20, chunks=5).map_blocks(fail_on_second, dtype=float, meta=np.ones(1)),
    )
    with pytest.raises(
        DataError, match="partition 2 of y could not be computed: ZeroDivisionError: deliberate"
    ) as error:
        load(client, {"X": X, "y": y})
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert client.futures == {}  # although the error, with its traceback, still lives


def test_what_the_adapter_finds_wrong_is_raised_as_it_is(client: Client) -> None:
    def inspect(part: Any) -> None:
        raise DataError("column 'late' is text")

    with pytest.raises(DataError, match="column 'late' is text"):
        load(client, {"X": da.ones((20, 2), chunks=(5, 2))}, inspect=inspect)


@pytest.mark.cluster
def test_a_partition_that_kills_its_workers_is_named(bridges_client: Client) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        X, y = da.ones((20, 2), chunks=(5, 2)), da.ones(20, chunks=5).map_blocks(die_on_second, meta=np.ones(1))
        with pytest.raises(DataError, match=r"partition 2 of X or y could not be computed: Attempted to run task"):
            load(bridges_client, {"X": X, "y": y})
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


# Spread


def test_parts_move_only_where_that_pays(client: Client, addresses: list[str]) -> None:
    first, second, _ = addresses
    parts = load(client, {"X": da.ones((40, 2), chunks=(10, 2))}, workers=[first])
    keys = [future.key for future in parts.futures]
    client.sync(parts.spread, client, [first])
    assert [future.key for future in parts.futures] == keys
    assert parts.holding() == [first]
    client.sync(parts.spread, client, [first, second])
    assert (parts.rows_on(first), parts.rows_on(second)) == (20, 20)
    stayed = [future.key for future in parts.futures if future.key in keys]
    assert len(stayed) == 2
    client.sync(parts.spread, client, [first, second])
    assert [key for key in keys if key in [future.key for future in parts.futures]] == stayed


def test_all_parts_leave_a_worker_that_takes_no_part(client: Client, addresses: list[str]) -> None:
    first, second, third = addresses
    parts = load(client, {"X": da.ones((40, 2), chunks=(10, 2))}, [second, third], workers=[first])
    assert sorted(parts.holding()) == [second, third]
    held = client.who_has(parts.futures)
    assert [tuple(held[future.key]) for future in parts.futures] == [(worker,) for worker in parts.workers]


def test_a_part_is_safe_from_the_dropping_of_spare_copies(client: Client, addresses: list[str]) -> None:
    first, second, _ = addresses
    parts = load(client, {"X": da.ones((40, 2), chunks=(10, 2))}, workers=[first])
    client.replicate(parts.futures, workers=[first, second])
    client.sync(parts.spread, client, [first, second])
    client.amm.run_once()
    held = client.who_has(parts.futures)
    assert [tuple(held[future.key]) for future in parts.futures] == [(worker,) for worker in parts.workers]


def test_a_worker_that_leaves_while_parts_move_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[partitions.load.__module__], "_LOOK_AGAIN", 0.05)

    async def scenario() -> None:
        async with (
            LocalCluster(n_workers=2, processes=False, asynchronous=True, dashboard_address=":0") as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            stays, leaves = cluster.workers.values()
            prepared = partitions.prepare(client, {"X": da.ones((40, 2), chunks=(10, 2))})
            parts = await partitions.load(client, prepared, workers=[stays.address])
            await leaves.close()
            with pytest.raises(PlacementError, match=f"{leaves.address}.* left the cluster while data were moved"):
                await parts.spread(client, [stays.address, leaves.address])

    asyncio.run(scenario())


def test_a_worker_that_is_paused_while_parts_move_to_it_is_named(
    client: Client, addresses: list[str], threads_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[partitions.load.__module__], "_LOOK_AGAIN", 0.05)
    first, second, _ = addresses
    parts = load(client, {"X": da.ones((40, 2), chunks=(10, 2))}, workers=[first])
    worker = next(worker for worker in threads_cluster.workers.values() if worker.address == second)
    monkeypatch.setattr(worker.memory_manager, "memory_pause_fraction", False)  # or it goes on by itself

    async def run() -> None:
        worker.status = Status.paused
        try:
            await parts.spread(client, [first, second])
        finally:
            worker.status = Status.running

    with (
        dask.config.set({"dask-bridges.timeout": "100 ms"}),
        pytest.raises(PlacementError, match=rf"workers \['{second}'\] are paused"),
    ):
        threads_cluster.sync(run)


def test_large_parts_are_cut_until_there_are_enough(client: Client, addresses: list[str]) -> None:
    X = np.arange(40).reshape(20, 2)
    parts = load(client, {"X": da.from_array(X, chunks=(20, 2)), "y": da.from_array(X[:, 0], chunks=20)})
    parts.split(client, 3)
    client.sync(parts.spread, client, addresses, everywhere=True)
    assert sorted(parts.rows) == [5, 5, 10]
    assert len(parts.holding()) == 3
    np.testing.assert_array_equal(np.concatenate(blocks(client, parts, "X")), X)


# Members take them


class Unspilling(dict[Any, Any]):
    """A worker's store that makes every value anew, as one read back from disk is."""

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peak = 0

    def __getitem__(self, key: Any) -> Any:
        value = pickle.loads(pickle.dumps(super().__getitem__(key)))
        if isinstance(value, dict) and "X" in value:
            handle = value["X"] = value["X"].view(Tracked)
            self.alive.add(handle)
            type(self).peak = max(self.peak, len(self.alive))
        return value


class Tracked(np.ndarray[Any, Any]):
    """An array that can be watched."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def forget_peak(rank: int, round: int) -> None:
    if round == -1:
        Unspilling.peak = 0


def test_a_member_takes_its_parts_one_at_a_time() -> None:
    X, y = da.ones((80, 2), chunks=(10, 2)), da.ones(80, chunks=10)
    with (
        LocalCluster(n_workers=1, processes=False, data=Unspilling, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        result = loopback.train(client, X, y, fault=forget_peak)
    assert result.total == 160
    assert 1 <= Unspilling.peak <= 2  # the next is there before the last one is let go


def take_lost(member: WorkerMember, payload: Any) -> Any:
    return partitions.take(member.worker, "gone")


def test_a_part_that_is_gone_is_a_data_error(gang: Callable[..., Any], addresses: list[str]) -> None:
    with pytest.raises(DataError, match=f"partition gone is no longer on worker {addresses[0]}"):
        gang(take_lost, [0])


def test_the_tolerance_is_configuration(client: Client, addresses: list[str]) -> None:
    first, second, _ = addresses
    assert config.get("balance-tolerance") == 0.1
    with dask.config.set({"dask-bridges.balance-tolerance": 10}):
        parts = load(client, {"X": da.ones((40, 2), chunks=(10, 2))}, [first, second], workers=[first])
    assert parts.holding() == [first]
