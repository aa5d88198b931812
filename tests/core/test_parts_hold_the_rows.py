"""Parts hold exactly the rows of their collection's partitions, wherever the collection comes from."""

from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from dask_bridges import partitions

TABLE = pd.DataFrame({"a": np.arange(40), "b": np.arange(40) % 3, "c": 1.0})


def _odd(frame: pd.DataFrame, remainder: int = 1) -> pd.DataFrame:
    return frame[frame.a % 2 == remainder]


SOURCES: dict[str, Any] = {
    "plain": lambda frame: frame,
    "columns": lambda frame: frame[["a", "b"]],
    "persisted": lambda frame: frame.persist(),
    "filtered": lambda frame: frame[frame.b == 1],
    "slice": lambda frame: frame.loc[12:33],
    "slice of persisted": lambda frame: frame.persist().loc[12:33],
    "mapped slice": lambda frame: frame.loc[12:33].map_partitions(_odd),
    "mapped slice of a mapped persisted": lambda frame: (
        frame.map_partitions(_odd).persist().loc[12:33].map_partitions(_odd, remainder=1)
    ),
    "merged": lambda frame: frame.merge(TABLE[["a"]].head(9), on="a"),
    "repartitioned": lambda frame: frame.repartition(npartitions=3),
    "concatenated": lambda frame: dd.concat([frame, frame.loc[30:]]),
    "shuffled": lambda frame: frame.shuffle("b"),
    "indexed": lambda frame: frame.set_index("b"),
    "some partitions": lambda frame: frame.partitions[2:5],
}


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_frames_parts_are_its_partitions(client: Client, source: Any) -> None:
    frame = source(dd.from_pandas(TABLE, npartitions=8))
    loaded = client.sync(partitions.load, client, partitions.prepare(client, {"X": frame, "y": frame["a"]}))
    parts = client.gather(loaded.futures)
    expected = [part.reset_index() for part in client.gather(client.compute(list(frame.to_delayed())))]
    assert [len(part) for part in expected] == loaded.rows
    for part, wanted in zip(parts, expected):
        pd.testing.assert_frame_equal(part["X"].reset_index(), wanted)
        assert part["y"].tolist() == wanted["a"].tolist()


def test_sets_prepared_together_hold_their_own_rows(client: Client) -> None:
    whole = dd.from_pandas(TABLE, npartitions=8)
    array = da.from_array(TABLE.to_numpy(), chunks=(9, 3))
    frames = [source(whole) for source in SOURCES.values()]
    sets = [{"X": frame, "y": frame["a"]} for frame in frames] + [{"X": array[20:]}]
    sets.append({"X": whole, "y": da.from_array(TABLE["a"].to_numpy(), chunks=5)})
    prepared = partitions.prepare_all(client, sets)
    loaded = client.sync(partitions.load_all, client, [(some, None) for some in prepared])
    for collections, parts in zip(sets, loaded):
        held = [part["X"] for part in client.gather(parts.futures)]
        if partitions.is_array(collections["X"]):
            np.testing.assert_array_equal(np.concatenate(held), collections["X"].compute())
        else:
            wanted = client.gather(client.compute(list(collections["X"].to_delayed())))
            for part, expected in zip(held, wanted):
                pd.testing.assert_frame_equal(part.reset_index(), expected.reset_index())


@pytest.mark.parametrize("persisted", [False, True])
def test_an_arrays_parts_are_its_rows(client: Client, persisted: bool) -> None:
    whole = np.arange(120).reshape(40, 3)
    array = da.from_array(whole, chunks=(7, 2))
    array = array.persist() if persisted else array
    labels = da.from_array(whole[:, 0], chunks=9) * 2
    loaded = client.sync(partitions.load, client, partitions.prepare(client, {"X": array[10:], "y": labels[10:]}))
    parts = client.gather(loaded.futures)
    np.testing.assert_array_equal(np.concatenate([part["X"] for part in parts]), whole[10:])
    np.testing.assert_array_equal(np.concatenate([part["y"] for part in parts]), whole[10:, 0] * 2)


def test_frames_and_arrays_meet_in_one_part(client: Client) -> None:
    frame = dd.from_pandas(TABLE, npartitions=4)
    labels = da.from_array(TABLE["a"].to_numpy(), chunks=10)
    prepared = partitions.prepare(client, {"X": frame, "y": labels, "weight": frame["c"]})
    loaded = client.sync(partitions.load, client, prepared)
    for part in client.gather(loaded.futures):
        assert list(part) == ["X", "y", "weight"]
        assert part["X"]["a"].tolist() == part["y"].tolist()
        assert part["X"].index.equals(part["weight"].index)
