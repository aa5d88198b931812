"""Partitions to blocks of rows, held against the whole table in one process."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import dask.array as da
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from dask_bridges import DataError
from dask_tf import looks
from dask_tf.encoding import Schema, blocks, look, merge, write

DAYS = pd.date_range("2013-01-01", periods=3)


class Memory:
    """A writer that keeps what it is given, as files would."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def array(self, file: str, array: Any) -> None:
        assert array.flags.c_contiguous
        assert file not in self.files
        self.files[file] = array.tobytes()


def written(parts: Sequence[dict[str, Any]], schema: Schema) -> list[Any]:
    """Each block of all chunks together, read from raw bytes by the schema alone."""
    memory = Memory()
    write(iter(parts), schema, memory)
    rows = np.frombuffer(memory.files.pop("rows"), "<i8")
    assert len(memory.files) == len(rows) * len(schema.blocks)
    assert all(0 < count <= schema.chunk_rows for count in rows)
    return [
        np.concatenate(
            [np.empty((0, block.width), block.dtype)]
            + [
                np.frombuffer(memory.files[f"{chunk}.{number}"], block.dtype).reshape(count, block.width)
                for chunk, count in enumerate(rows)
            ]
        )
        for number, block in enumerate(schema.blocks)
    ]


def agreed(parts: Sequence[dict[str, Any]]) -> Schema:
    return merge([look(part) for part in parts], list(parts[0]))


def columns(parts: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Schema]:
    """The columns of X, all partitions together, and the schema."""
    schema = agreed(parts)
    arrays = written(parts, schema)
    return {column.name: arrays[column.block][:, column.at] for column in schema.collections[0].columns}, schema


# Arrays


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from(sorted(looks.NUMBERS - {"bfloat16"})),
    st.sampled_from([(), (3,), (2, 2), (0,)]),
    st.sampled_from([1, 4, 16]),
)
def test_arrays_come_out_row_for_row(layout: list[int], dtype: str, shape: tuple[int, ...], chunk: int) -> None:
    random = np.random.default_rng(0)
    parts = [
        {"X": random.integers(0, 2, (rows, *shape)).astype(dtype), "y": random.random(rows).astype(">f4")}
        for rows in layout
    ]
    X, y = written(parts, replace(agreed(parts), chunk_rows=chunk))
    np.testing.assert_array_equal(X.reshape(sum(layout), *shape), np.concatenate([part["X"] for part in parts]))
    np.testing.assert_array_equal(y[:, 0], np.concatenate([part["y"] for part in parts]))
    assert X.dtype == dtype


def test_bfloat16_is_written_as_it_is() -> None:
    X = np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16)
    schema = agreed([{"X": X}])
    ((_, (block,)),) = blocks({"X": X}, schema)
    np.testing.assert_array_equal(block, X)
    assert schema.row_bytes == 4


def test_arrays_that_lie_row_after_row_are_not_copied() -> None:
    part = {"X": np.ones((5000, 100)), "y": np.ones(5000, "float32")}
    for _, arrays in blocks(part, agreed([part])):
        assert all(np.shares_memory(array, whole) for array, whole in zip(arrays, part.values()))


def test_arrays_in_fortran_order_are_turned_round_chunk_by_chunk() -> None:
    X = np.asfortranarray(np.random.default_rng(0).random((30_000, 40)))
    assert_one_chunk_at_a_time({"X": X})
    np.testing.assert_array_equal(written([{"X": X}], agreed([{"X": X}]))[0], X)


def assert_one_chunk_at_a_time(part: dict[str, Any]) -> None:
    schema = agreed([part])
    tracemalloc.start()
    try:
        assert sum(1 for _ in blocks(part, schema)) > 4
        # One chunk yielded and the next being made.
        assert tracemalloc.get_traced_memory()[1] < 2.5 * schema.chunk_rows * schema.row_bytes
    finally:
        tracemalloc.stop()


def test_a_partition_that_is_recomputed_otherwise_is_refused() -> None:
    schema = agreed([{"X": np.ones((4, 2))}])
    for other in (np.ones((4, 3)), np.ones((4, 2), "float32")):
        with pytest.raises(DataError, match=r"a partition of X is now float.* was float64 with .2,. when"):
            list(blocks({"X": other}, schema))


# Frames


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "a": random.random(rows),
            "b": random.integers(-5, 5, rows),
            "c": random.random(rows),
            "d": random.integers(0, 2, rows).astype(bool),
            "e": random.integers(0, 9, rows).astype("int16"),
            "city": random.choice(["Oslo", "Bonn", "Rome"], rows),
        }
    )


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.sampled_from([1, 8]))
def test_frames_come_out_row_for_row_and_column_for_column(layout: list[int], chunk: int) -> None:
    whole = table(sum(layout))
    ends = np.cumsum(layout)
    parts = [{"X": whole.iloc[end - rows : end]} for rows, end in zip(layout, ends)]
    schema = replace(agreed(parts), chunk_rows=chunk)
    arrays = written(parts, schema)
    for column in schema.collections[0].columns:
        found = arrays[column.block][:, column.at]
        if column.values is None:
            np.testing.assert_array_equal(found, whole[column.name])
            assert found.dtype == whole[column.name].dtype
        else:
            np.testing.assert_array_equal(np.array([*column.values, None])[found], whole[column.name])


def test_columns_of_one_dtype_share_a_block_and_collections_do_not() -> None:
    schema = agreed([{"X": table(4), "y": pd.Series(np.arange(4.0))}])
    assert [(block.role, block.dtype, block.width) for block in schema.blocks] == [
        ("X", "float64", 2),
        ("X", "int64", 1),
        ("X", "bool", 1),
        ("X", "int16", 1),
        ("X", "int32", 1),
        ("y", "float64", 1),
    ]
    assert [column.name for column in schema.columns_of(0)] == ["a", "c"]


def test_frames_take_the_memory_of_one_chunk() -> None:
    frame = pd.DataFrame({f"c{i}": np.random.default_rng(i).random(60_000) for i in range(20)})
    assert_one_chunk_at_a_time({"X": frame})
    assert_one_chunk_at_a_time({"X": frame.astype("Float64").astype({"c0": "Int64"})})


@pytest.mark.parametrize(
    "dtype", ["object", "str", "string", "string[pyarrow]", pd.ArrowDtype(pytest.importorskip("pyarrow").string())]
)
def test_text_becomes_its_place_among_all_strings_sorted(dtype: Any) -> None:
    first, second = pd.Series(["Oslo", None, "Bonn"], dtype=dtype), pd.Series(["Rome", "Oslo", "Åre"], dtype=dtype)
    found, schema = columns([{"X": first.to_frame("city")}, {"X": second.to_frame("city")}])
    words = ["Bonn", "Oslo", "Rome", "Åre"]
    assert schema.vocabulary("city") == words
    assert [words[i] if i >= 0 else None for i in found["city"]] == ["Oslo", None, "Bonn", "Rome", "Oslo", "Åre"]
    assert found["city"].dtype == "int32"


def test_text_without_any_string_is_all_missing() -> None:
    found, schema = columns([{"X": pd.DataFrame({"city": pd.Series([None, None], dtype="object")})}])
    assert schema.vocabulary("city") == []
    assert list(found["city"]) == [-1, -1]


def test_categories_keep_their_order_and_those_of_later_partitions_follow() -> None:
    first = pd.Categorical(["low", "high", None], categories=["low", "middle", "high"], ordered=True)
    second = pd.Categorical(["worst", "low"], categories=["worst", "low"])
    found, schema = columns([{"X": pd.DataFrame({"risk": values})} for values in (first, second)])
    assert schema.vocabulary("risk") == ["low", "middle", "high", "worst"]
    assert list(found["risk"]) == [0, 2, -1, 3, 0]


def test_categories_that_are_no_strings_are_told_as_strings() -> None:
    frame = pd.DataFrame({"size": pd.Categorical([8, 2, 8]), "span": pd.cut([1, 5, 1], [0, 2, 6])})
    found, schema = columns([{"X": frame}])
    assert schema.vocabulary("size") == ["2", "8"]
    assert schema.vocabulary("span") == ["(0, 2]", "(2, 6]"]
    assert list(found["size"]) == [1, 0, 1]
    assert list(found["span"]) == [0, 1, 0]


@pytest.mark.parametrize(
    ("dtype", "whole", "with_nulls"),
    [
        ("Int64", "int64", "float64"),
        ("UInt32", "uint32", "float64"),
        ("Int32", "int32", "float64"),
        ("Int16", "int16", "float32"),
        ("UInt8", "uint8", "float32"),
        ("boolean", "bool", "float32"),
        ("Float32", "float32", "float32"),
        ("Float64", "float64", "float64"),
        ("int64[pyarrow]", "int64", "float64"),
        ("bool[pyarrow]", "bool", "float32"),
        ("float[pyarrow]", "float32", "float32"),
    ],
)
def test_nullable_columns_are_floats_in_all_partitions_if_one_has_nulls(
    dtype: str, whole: str, with_nulls: str
) -> None:
    full, holes = (pd.DataFrame({"a": pd.Series(values, dtype=dtype)}) for values in ([1, 0, 1], [None, 1]))
    found, _ = columns([{"X": full}, {"X": full}])
    assert (found["a"].dtype, list(found["a"])) == (whole, [1, 0, 1] * 2)
    found, _ = columns([{"X": full}, {"X": holes}])
    assert found["a"].dtype == with_nulls
    np.testing.assert_array_equal(found["a"], [1, 0, 1, np.nan, 1])


def test_empty_partitions_have_no_say_in_dtypes() -> None:
    frame = pd.DataFrame({"a": [1.5], "city": ["Oslo"]})
    empty = frame.iloc[:0].astype({"a": "object", "city": "float64"})
    found, _ = columns([{"X": empty}, {"X": frame}, {"X": empty}])
    assert (list(found["a"]), list(found["city"])) == ([1.5], [0])


def test_partitions_that_are_all_empty_give_a_schema_and_no_chunk() -> None:
    part = {"X": table(0), "y": np.empty(0)}
    schema = agreed([part, part])
    memory = Memory()
    write([part, part], schema, memory)
    assert memory.files == {"rows": b""}
    assert [column.name for column in schema.collections[0].columns] == list(table(0).columns)


# Vocabularies, looks, chunks


def test_vocabularies_are_found_by_column_or_by_the_role_of_a_series() -> None:
    words = pd.Series(["Oslo", "Bonn"], name="city")
    schema = agreed([{"X": pd.DataFrame({"city": words, "a": [1, 2]}), "y": words, "z": pd.DataFrame({"city": words})}])
    assert schema.vocabulary("y") == schema.vocabulary("city", "z") == ["Bonn", "Oslo"]
    with pytest.raises(KeyError, match=r"no text or categorical column 'a' in this feed; .* 'city' of X, 'y' of y"):
        schema.vocabulary("a")
    with pytest.raises(KeyError, match="several columns 'city'"):
        schema.vocabulary("city")


def test_looks_are_small() -> None:
    part = {"X": table(100_000), "y": np.ones((100_000, 9))}
    assert len(pickle.dumps(look(part))) < 2000


def test_chunks_are_bounded_in_bytes_and_hold_a_row_at_least() -> None:
    for width, rows in ((128, 2048), (200, 1024), (10**6, 1)):
        part = {"X": np.ones((1, width), "float32")}
        assert agreed([part]).chunk_rows == rows


def test_no_partition_is_held_once_it_is_written() -> None:
    alive: list[Any] = []

    def parts() -> Iterator[dict[str, Any]]:
        for rows in (3, 4, 5):
            gc.collect()
            assert [part() for part in alive] == [None] * len(alive)
            X = np.ones((rows, 2))
            alive.append(weakref.ref(X))
            yield {"X": X}
            del X

    write(parts(), agreed([{"X": np.ones((1, 2))}]), Memory())
    assert len(alive) == 3


# Refusals


def frame(**values: Any) -> dict[str, Any]:
    return {"X": pd.DataFrame(values)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        frame(t=DAYS),
        r"column 't' of X has dtype datetime64.*: make numbers .*total_seconds\(\).* \(seen in partition 1\)",
    ),
    (frame(t=DAYS.tz_localize("UTC")), "column 't' of X has dtype datetime64.*UTC.*: make numbers"),
    (frame(t=DAYS - DAYS[0]), r"column 't' of X has dtype timedelta64.*: .* t.dt.total_seconds\(\)"),
    (frame(t=DAYS.to_period("D")), "column 't' of X has dtype period.D., which is neither number, text nor category"),
    (frame(a=[[1], [2, 3]]), "column 'a' of X holds Python objects .*: give it a dtype, X.astype"),
    (frame(a=["x", 1]), "column 'a' of X holds Python objects .mixed-integer.: give it a dtype"),
    (frame(a=pd.Series([True, None], dtype="object")), "column 'a' of X holds Python objects .boolean."),
    ({"X": pd.Series(DAYS)}, "X has dtype datetime64"),
    ({"X": pd.DataFrame({3: [1.0]})}, r"column 3 of X is not named by a string.*X.rename\(columns=str\)"),
    ({"X": pd.DataFrame([[1, 2]], columns=["a", "a"])}, "X has 2 columns of the name 'a'"),
    ({"X": pd.DataFrame(index=[1, 2])}, "X has no columns"),
    ({"X": sp.csr_matrix(np.eye(3))}, r"X is sparse: make it dense, X.map_blocks\(lambda block: block.toarray"),
    ({"X": np.ma.masked_equal([1, 2], 2)}, r"X has a mask: fill it, dask.array.ma.filled"),
    ({"X": np.array(DAYS)}, "X has dtype datetime64.*: make numbers of it"),
    ({"X": np.array(["a", "b"])}, "X has dtype str.*, which is no number: .* dask.dataframe.from_dask_array"),
    ({"X": np.array([{}, 1], dtype="object")}, "X has dtype object, which is no number"),
    ({"X": np.ones(2, "longdouble")}, "X has dtype (long|float).*, which is no number"),
]


@pytest.mark.parametrize(("part", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_fed_is_refused_with_what_to_do(part: dict[str, Any], message: str) -> None:
    empty = {"X": part["X"][:0]}
    with pytest.raises(DataError, match=message):
        agreed([empty, part])


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (frame(a=[1]), frame(a=[1.0]), r"column 'a' of X is float64 in partition 2 and int64 in partition 0: .*astype"),
        (frame(a=["x"]), frame(a=pd.Categorical(["x"])), "column 'a' of X is categorical in partition 2 and text"),
        (frame(a=[1]), frame(b=[1]), r"partition 2 of X has columns \['b'\], and partition 0 \['a'\]"),
        ({"X": np.ones(3)}, {"X": np.ones(3, int)}, "X is int64 in partition 2 and float64 in partition 0"),
        (
            {"X": np.ones((3, 2))},
            {"X": np.ones((3, 4))},
            r"rows of X have shape \(4,\) in partition 2 and \(2,\) in partition 0: .* pad or crop",
        ),
    ],
)
def test_partitions_that_disagree_are_named(first: dict[str, Any], other: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        agreed([first, {"X": first["X"][:0]}, other])


def test_a_vocabulary_too_large_to_travel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "MOST_WORDS", 5)
    with pytest.raises(DataError, match=r"column 'id' of X holds 6 different strings, .* 5 at most: hash them"):
        agreed([frame(id=["a", "b", "c"]), frame(id=["d", "e", "f"])])


def test_parts_of_dask_collections_are_taken_as_they_are() -> None:
    array = da.random.default_rng(0).random((20, 3), chunks=(6, 3))
    parts = [{"X": block} for block in (array.blocks[i].compute() for i in range(array.numblocks[0]))]
    (found,) = written(parts, agreed(parts))
    np.testing.assert_array_equal(found, np.concatenate([part["X"] for part in parts]))
