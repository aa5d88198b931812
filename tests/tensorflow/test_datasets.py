"""A spooled feed as a dataset, held against the concatenation of its partitions."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_bridges.processes.spool import Spool
from dask_tf import looks
from dask_tf.datasets import dataset
from dask_tf.encoding import Schema, look, merge, write

#: A feed's folder and schema.
Feed = tuple[str, Schema]


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool("test", budget=lambda: 2**30, overflow=tmp_path) as spool:
        yield spool


@pytest.fixture
def fed(spool: Spool) -> Callable[..., Feed]:
    """``fed(parts, chunk_rows)`` writes a feed, in place of the one before; with `schema`, by that one."""

    def fed(parts: Sequence[dict[str, Any]], chunk_rows: int = 8, schema: Schema | None = None) -> Feed:
        spool.drop("train")
        schema = schema or replace(merge([look(part) for part in parts], list(parts[0])), chunk_rows=chunk_rows)
        with spool.writer("train") as writer:
            write(parts, schema, writer)
        return str(spool.path / "train"), schema

    return fed


def numbered(layout: Sequence[int]) -> list[dict[str, Any]]:
    """Partitions whose rows carry their number: as a row of X, and as y."""
    y = np.split(np.arange(sum(layout)), np.cumsum(layout)[:-1])
    return [{"X": np.stack([rows, -rows, rows], 1).astype("float32"), "y": rows} for rows in y]


def rows_of(batches: Any) -> list[int]:
    """The numbers of the rows of `numbered`, in the order of a dataset."""
    numbers: list[int] = []
    for X, y in batches.as_numpy_iterator():
        np.testing.assert_array_equal(X, np.stack([y, -y, y], 1))
        numbers += y.tolist()
    return numbers


# Order


@pytest.mark.parametrize("drop_remainder", [False, pytest.param(True, marks=pytest.mark.slow)])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.sampled_from([1, 3, 8, 64]), st.sampled_from([1, 7, 8]))
def test_rows_come_in_order_in_full_batches_whatever_the_partitions(
    tf: Any, fed: Callable[..., Feed], drop_remainder: bool, layout: list[int], batch: int, chunk: int
) -> None:
    folder, schema = fed(numbered(layout), chunk)
    batches = dataset(folder, schema, batch, drop_remainder=drop_remainder)
    rows = sum(layout) // batch * batch if drop_remainder else sum(layout)
    assert rows_of(batches) == list(range(rows))
    sizes = [len(y) for _, y in batches]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)


def test_one_dataset_reads_what_is_there_each_time(tf: Any, fed: Callable[..., Feed]) -> None:
    batches = dataset(*fed(numbered([5, 9])), 4)
    schema = fed(numbered([5]))[1]
    for layout in ([5], [0, 0], [100, 1], [0, 30, 2]):
        fed(numbered(layout), schema=schema)
        assert rows_of(batches) == list(range(sum(layout)))


def test_a_dataset_can_be_built_before_its_feed_is_written(tf: Any, spool: Spool, fed: Callable[..., Feed]) -> None:
    parts = numbered([9])
    batches = dataset(str(spool.path / "train"), merge([look(part) for part in parts], ["X", "y"]), 4)
    with pytest.raises(tf.errors.NotFoundError):
        rows_of(batches)
    fed(parts)
    assert rows_of(batches) == list(range(9))


def test_passes_repeat_and_none_shares_a_batch_with_the_next(tf: Any, fed: Callable[..., Feed]) -> None:
    feed = fed(numbered([5, 6]))
    assert [len(y) for _, y in dataset(*feed, 4, repeat=3)] == [4, 4, 3] * 3
    assert [len(y) for _, y in dataset(*feed, 4, repeat=None).take(50)] == ([4, 4, 3] * 17)[:50]
    assert [len(y) for _, y in dataset(*feed, 4, repeat=0)] == []


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("repeat", [1, 3, None])
def test_no_rows_end_at_once_even_when_repeated_for_ever(
    tf: Any, fed: Callable[..., Feed], shuffle: bool, repeat: int | None
) -> None:
    feed = fed(numbered([0, 0]))
    assert rows_of(dataset(*feed, 4, shuffle=shuffle, repeat=repeat)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; 1 or more"),
        ({"batch_size": 4, "repeat": -1}, "repeat is -1; 0 or more"),
        ({"batch_size": 4, "window_bytes": 0}, "window_bytes is 0; 1 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(tf: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset("/nowhere", merge([look(part) for part in numbered([3])], ["X", "y"]), **options)


# Shuffling


@pytest.mark.slow
@pytest.mark.parametrize("window_bytes", [None, 200, 2000])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.sampled_from([1, 3, 8, 64]))
def test_shuffling_loses_and_repeats_no_row(
    tf: Any, fed: Callable[..., Feed], window_bytes: int | None, layout: list[int], batch: int
) -> None:
    batches = dataset(*fed(numbered(layout)), batch, shuffle=True, window_bytes=window_bytes)
    assert sorted(rows_of(batches)) == list(range(sum(layout)))
    sizes = [len(y) for _, y in batches]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)


def test_every_pass_and_every_iteration_has_an_order_of_its_own(tf: Any, fed: Callable[..., Feed]) -> None:
    batches = dataset(*fed(numbered([64, 64])), 16, shuffle=True, seed=3, repeat=2)
    orders = [order for _ in range(2) for order in np.reshape(rows_of(batches), (2, 128)).tolist()]
    assert all(sorted(order) == list(range(128)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    again = dataset(*fed(numbered([64, 64])), 16, shuffle=True, seed=3, repeat=2)
    assert orders == [order for _ in range(2) for order in np.reshape(rows_of(again), (2, 128)).tolist()]


def test_without_a_seed_orders_differ(tf: Any, fed: Callable[..., Feed]) -> None:
    feed = fed(numbered([64, 64]))
    first, second = (rows_of(dataset(*feed, 16, shuffle=True)) for _ in range(2))
    assert first != second


_ORDERS = """
import json, pickle, sys
from dask_tf.datasets import dataset
folder, schema = pickle.load(sys.stdin.buffer)
batches = dataset(folder, schema, 16, shuffle=True, seed=11, window_bytes=600)
print(json.dumps([[y for _, ys in batches.as_numpy_iterator() for y in ys.tolist()] for _ in range(2)]))
"""


@pytest.mark.slow  # TensorFlow is imported once more
def test_a_seed_gives_the_same_orders_in_another_process(tf: Any, fed: Callable[..., Feed]) -> None:
    feed = fed(numbered([64, 30, 40]))
    there = subprocess.run([sys.executable, "-c", _ORDERS], input=pickle.dumps(feed), capture_output=True, check=True)
    batches = dataset(*feed, 16, shuffle=True, seed=11, window_bytes=600)
    assert json.loads(there.stdout) == [rows_of(batches) for _ in range(2)]


def test_a_window_mixes_rows_of_several_partitions(tf: Any, fed: Callable[..., Feed]) -> None:
    feed = fed(numbered([512] * 8), chunk_rows=64)
    # 16 of 64 chunks, each of one partition.
    order = np.array(rows_of(dataset(*feed, 64, shuffle=True, seed=0, window_bytes=16 * 64 * feed[1].row_bytes)))
    of_a_batch = [len(set(batch // 512)) for batch in order.reshape(-1, 64)]
    assert min(of_a_batch) >= 4
    # Rows are as far from their neighbours as the window lets them be: with 16 chunks, 15 of 16 are of another.
    neighbours = np.mean(order[1:] // 64 == order[:-1] // 64)
    assert neighbours < 0.15


def test_every_window_has_an_order_of_its_own(tf: Any, fed: Callable[..., Feed]) -> None:
    feed = fed(numbered([256]), chunk_rows=64)
    order = np.array(rows_of(dataset(*feed, 64, shuffle=True, window_bytes=64 * feed[1].row_bytes)))
    windows = order.reshape(4, 64)
    assert [len(set(window // 64)) for window in windows] == [1] * 4
    assert len({tuple(window % 64) for window in windows}) == 4


def test_default_windows_are_bounded_at_both_ends(tf: Any) -> None:
    from dask_tf.datasets import _window_rows

    schema = merge([look({"X": np.ones((1, 2**10), "float32")})], ["X"])
    for megabytes, window in ((1, 4), (200, 10), (10_000, 32)):
        rows = tf.constant([megabytes * 2**8], tf.int64)
        assert int(_window_rows(schema, rows, None)) == window * 2**8


# Elements


@pytest.mark.parametrize("dtype", sorted(looks.NUMBERS))
def test_every_dtype_comes_through(tf: Any, fed: Callable[..., Feed], dtype: str) -> None:
    X = np.random.default_rng(0).integers(0, 2, (20, 3)).astype(getattr(ml_dtypes, dtype, dtype))
    found = list(dataset(*fed([{"X": X[:9]}, {"X": X[9:]}]), 6))
    assert {batch.dtype.name for batch in found} == {dtype}
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in found]), X)


@pytest.mark.parametrize("shape", [(), (2,), (4, 3, 2), (0,)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_keep_their_shape(tf: Any, fed: Callable[..., Feed], shape: tuple[int, ...], shuffle: bool) -> None:
    X = np.random.default_rng(0).random((20, *shape))
    batches = dataset(*fed([{"X": X}]), 8, shuffle=shuffle)
    assert batches.element_spec == tf.TensorSpec([None, *shape], tf.float64)
    assert [batch.shape for batch in batches] == [(8, *shape), (8, *shape), (4, *shape)]
    whole = np.concatenate(list(batches.as_numpy_iterator()))
    np.testing.assert_array_equal(np.sort(whole, axis=0) if shuffle else whole, np.sort(X, axis=0) if shuffle else X)


def test_batches_are_of_a_known_size_when_the_rest_is_dropped(tf: Any, fed: Callable[..., Feed]) -> None:
    batches = dataset(*fed(numbered([20])), 8, drop_remainder=True, shuffle=True)
    assert batches.element_spec == (tf.TensorSpec([8, 3], tf.float32), tf.TensorSpec([8], tf.int64))


def test_frames_are_dicts_of_columns_and_series_are_flat(tf: Any, fed: Callable[..., Feed]) -> None:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "b": random.random(50),
            "city": random.choice(np.array(["Oslo", "Bonn", None], "object"), 50),
            "a": random.random(50),
            "n": pd.array(random.integers(0, 9, 50), "Int64"),
            "size": pd.Categorical(random.choice(["S", "L"], 50), categories=["S", "M", "L"]),
        }
    )
    target = pd.Series(random.choice(["yes", "no"], 50))
    cuts = [slice(0, 11), slice(11, 11), slice(11, 50)]
    feed = fed([{"X": frame[cut], "y": target[cut], "sample_weight": frame["a"][cut].to_numpy()} for cut in cuts])
    batches = list(dataset(*feed, 16).as_numpy_iterator())
    X = pd.DataFrame({name: np.concatenate([x[name] for x, _, _ in batches]) for name in frame})
    y, weight = (np.concatenate([batch[at] for batch in batches]) for at in (1, 2))
    for name in ("a", "b", "n"):
        np.testing.assert_array_equal(X[name], frame[name])
    schema = feed[1]
    for found, name, wanted in (
        (X["city"], "city", frame["city"]),
        (X["size"], "size", frame["size"]),
        (y, "y", target),
    ):
        words = np.array([*schema.vocabulary(name), None], "object")
        assert [words[i] for i in found] == [None if pd.isna(word) else word for word in wanted]
    np.testing.assert_array_equal(weight, frame["a"])


@pytest.mark.slow
def test_keras_trains_on_it(tf: Any, fed: Callable[..., Feed]) -> None:
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras runs on another backend")
    x = np.random.default_rng(0).random(512).astype("float32")
    frame = pd.DataFrame({"a": x, "kind": np.where(x > 0.5, "up", "down")})
    feed = fed([{"X": frame, "y": 2 * frame["a"] + (frame["kind"] == "up")}], chunk_rows=128)
    a, kind = keras.Input((), name="a"), keras.Input((), name="kind", dtype="int32")
    embedded = keras.layers.Embedding(len(feed[1].vocabulary("kind")), 1, embeddings_initializer="zeros")(kind)
    column = keras.layers.Reshape((1,))(a)
    model = keras.Model({"a": a, "kind": kind}, keras.layers.Dense(1, kernel_initializer="zeros")(column) + embedded)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    history = model.fit(dataset(*feed, 32, shuffle=True, seed=0), epochs=20, verbose=0).history
    assert history["loss"][-1] < 1e-2


# Parameter servers

_SERVER = """
import os, sys
import tensorflow as tf
job, folder, fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
if folder:
    os.dup2(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fd)
server = tf.distribute.Server(tf.train.ClusterSpec({job: {0: "localhost:0"}}), job_name=job, task_index=0)
print(server.target.removeprefix("grpc://"), flush=True)
sys.stdin.read()
os._exit(0)
"""

_COORDINATOR = """
import json, os, pickle, sys, traceback
import tensorflow as tf
from dask_tf.datasets import dataset

addresses, folder, feeds = pickle.load(sys.stdin.buffer)
assert not os.path.exists(folder)
resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec({**addresses, "chief": ["localhost:0"]}), rpc_layer="grpc", task_type="chief", task_id=0
)
strategy = tf.distribute.ParameterServerStrategy(resolver)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)

@tf.function
def closure(iterator):
    found = tf.TensorArray(tf.int64, 0, dynamic_size=True, infer_shape=False)
    for number in tf.range(4):
        batch = iterator.get_next_as_optional()
        if batch.has_value():
            X, y = batch.get_value()
            tf.debugging.assert_equal(tf.cast(y, X.dtype), X[:, 0])
            found = found.write(number, y)
        else:
            found = found.write(number, tf.zeros([0], tf.int64))
    return found.concat()

def rows(closures, name, **options):
    make = lambda: dataset(f"{folder}/{name}", feeds[name], 16, **options)
    iterator = iter(coordinator.create_per_worker_dataset(make))
    results = [coordinator.schedule(closure, args=(iterator,)) for _ in range(closures)]
    return [row for result in results for row in result.fetch().tolist()]

@tf.function
def strict(iterator):
    return next(iterator)[1]

def ended():
    make = lambda: dataset(f"{folder}/empty", feeds["empty"], 16, repeat=None)
    iterator = iter(coordinator.create_per_worker_dataset(make))
    coordinator.schedule(strict, args=(iterator,))
    try:
        coordinator.join()
    except tf.errors.OutOfRangeError:
        return True

try:
    print(json.dumps({
        "plain": rows(6, "train"),
        "shuffled": rows(6, "train", shuffle=True, seed=5, repeat=2),
        "none": rows(1, "empty", shuffle=True, repeat=None),
        "ended": ended(),
        "after": rows(6, "train"),
    }), flush=True)
except BaseException:
    traceback.print_exc()
os._exit(0)  # a coordinator does not end by itself
"""


@pytest.mark.slow  # TensorFlow is imported twice more
def test_one_graph_is_read_in_the_process_of_a_parameter_servers_worker(
    tf: Any, spool: Spool, fed: Callable[..., Feed], tmp_path: Path
) -> None:
    parts = numbered([40, 0, 150])
    folder, schema = fed(parts, 32)
    with spool.writer("empty") as writer:
        write([], schema, writer)
    number = 97
    with ExitStack() as stack:

        def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
            script = tmp_path / f"{len(code)}.py"  # a file, since AutoGraph reads its source
            script.write_text(code)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
            )
            stack.callback(process.kill)
            return process

        servers = {
            "ps": start(_SERVER, "ps", "", "0"),
            "worker": start(_SERVER, "worker", str(Path(folder).parent), str(number)),
        }
        addresses = {job: [server.stdout.readline().decode().strip()] for job, server in servers.items()}  # type: ignore[union-attr]
        work = pickle.dumps((addresses, f"/proc/self/fd/{number}", {"train": schema, "empty": schema}))
        out, _ = start(_COORDINATOR).communicate(work, timeout=150)
    found = json.loads(out)
    assert found["plain"] == found["after"] == list(range(190))
    assert found["shuffled"] != found["plain"]
    first, second = found["shuffled"][:190], found["shuffled"][190:]
    assert sorted(first) == sorted(second) == list(range(190))
    assert first != second
    assert found["none"] == []
    assert found["ended"]
    # The same dataset in this process comes in the same order.
    assert rows_of(dataset(folder, schema, 16, shuffle=True, seed=5)) == first
