"""The spool: what is read is what was written, wherever it fits, and nothing of it outlives its owner."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from dask_bridges import BridgeError, DataError
from dask_bridges.processes import files
from dask_bridges.processes.spool import Spool, read_array, read_frame, sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="spools are for child processes, which need Linux")

MiB = 2**20
ROUND_TRIPS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(spool: Spool, feed: str = "train", **contents: Any) -> Any:
    """Write a feed of arrays; a function among them is called, with the writer."""
    with spool.writer(feed) as writer:
        for file, content in contents.items():
            content(writer) if callable(content) else writer.array(file, content)
    return writer


def nothing_left(*folders: Path) -> bool:
    """No file in any of these folders, but for the lock that all spools share."""
    found = [path for folder in folders if folder.exists() for path in folder.rglob("*") if not path.is_dir()]
    return [path for path in found if path.parent.name != home_name()] == []


def home_name() -> str:
    return f"dask-bridges-{os.geteuid()}"


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that is taken for memory, and one on disk; both are empty afterwards."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    yield memory, disk
    assert nothing_left(memory, disk)


@pytest.fixture
def make(places: tuple[Path, Path]) -> Iterator[Callable[..., Spool]]:
    """Makes spools in `places`, with plenty of memory."""
    memory, disk = places
    with contextlib.ExitStack() as stack:

        def make(**given: Any) -> Spool:
            options: dict[str, Any] = {"budget": lambda: 2**40, "overflow": disk, "base": memory} | given
            return stack.enter_context(Spool("test", **options))

        yield make


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


# What is written is what is read


dtypes = st.one_of(
    some.scalar_dtypes(),
    some.array_dtypes(allow_subarrays=False),
    st.sampled_from([np.dtype("c8"), np.dtype(">i4"), np.dtype("S3"), np.dtype(">U2"), np.dtype("f2")]),
)
arrays = some.arrays(
    dtypes,
    some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    elements={"allow_nan": False},
)


@st.composite
def strided(draw: st.DrawFn) -> np.ndarray:
    """An array of any dtype, rank and layout: reversed, with steps, transposed, broadcast."""
    array: np.ndarray = draw(arrays)
    if array.ndim:
        steps = st.sampled_from([1, 2, -1, -2])
        array = array[tuple(slice(None, None, draw(steps)) for _ in range(array.ndim))]
        array = array.transpose(draw(st.permutations(range(array.ndim))))
        if draw(st.booleans()):
            array = np.broadcast_to(array, (3, *array.shape))
    return array


@ROUND_TRIPS
@given(array=strided(), piece=st.sampled_from([1, 7, 64, files.SLICE]))
def test_arrays_of_any_dtype_and_layout_are_read_as_written(
    make: Callable[..., Spool], monkeypatch: pytest.MonkeyPatch, array: np.ndarray, piece: int
) -> None:
    monkeypatch.setattr(files, "SLICE", piece)
    with make() as spool:
        with spool.writer("train") as writer:
            writer.array("X", array)
        assert writer.nbytes == array.nbytes
        read = read_array(spool.path / "train" / "X", array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)
        assert read.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
        assert not read.flags.writeable


def test_an_extension_dtype_is_read_as_written(make: Callable[..., Spool]) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    array = np.arange(6).astype(bfloat16).reshape(2, 3).T
    with make().writer("train") as writer:
        writer.array("X", array)
    np.testing.assert_array_equal(read_array(writer_path(writer, "X"), bfloat16, (3, 2)), array)


def writer_path(writer: Any, file: str) -> Path:
    return Path(writer._folder / file)


def test_a_strided_array_is_copied_in_slices(make: Callable[..., Spool]) -> None:
    import tracemalloc

    array = np.arange(8 * MiB, dtype="float64").reshape(2048, -1).T
    with make().writer("train") as writer:
        tracemalloc.start()
        writer.array("X", array)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2.5 * files.SLICE < array.nbytes
    np.testing.assert_array_equal(read_array(writer_path(writer, "X"), "float64", array.shape), array)


def test_an_array_read_with_the_wrong_shape_is_refused(make: Callable[..., Spool]) -> None:
    with make().writer("train") as writer:
        writer.array("X", np.zeros(6))
    with pytest.raises(DataError, match=r"holds 48 bytes, where shape \(2, 2\) of float64 needs 32"):
        read_array(writer_path(writer, "X"), "float64", (2, 2))


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.array(["a", None], dtype=object), "of dtype object"),
        (np.ma.masked_array([1, 2], [True, False]), "masked"),
        (np.zeros(2, [("a", object)]), "of dtype"),
    ],
)
def test_arrays_without_plain_bytes_are_refused(make: Callable[..., Spool], array: np.ndarray, what: str) -> None:
    with pytest.raises(DataError, match=f"feed 'train', file 'X': an array {what}"), make().writer("train") as writer:
        writer.array("X", array)


COLUMNS: dict[str, Callable[[int], Any]] = {
    "numbers": lambda n: np.arange(n, dtype="int32"),
    "floats": lambda n: np.where(np.arange(n) % 3 == 1, np.nan, np.arange(n)),
    "halves": lambda n: np.arange(n, dtype="float16"),
    "truths": lambda n: np.arange(n) % 2 == 0,
    "strings": lambda n: pd.array([None if i % 4 == 3 else "é" * i for i in range(n)], dtype="str"),
    "old strings": lambda n: pd.array([None if i % 4 == 3 else "é" * i for i in range(n)], dtype="string"),
    "categories": lambda n: pd.Categorical([None if i % 4 == 3 else "abc"[i % 3] for i in range(n)], list("cabd")),
    "ordered": lambda n: pd.Categorical(np.arange(n) % 3, [2, 0, 1, 9], ordered=True),
    "nullable": lambda n: pd.array([None if i % 2 else i for i in range(n)], dtype="Int16"),
    "arrow": lambda n: pd.array([None if i % 2 else i for i in range(n)], dtype="double[pyarrow]"),
    "times": lambda n: pd.to_datetime([pd.NaT if i % 3 == 1 else pd.Timestamp(i, unit="D") for i in range(n)]),
    "zoned": lambda n: pd.date_range("2020-03-28 12:00", periods=n, freq="h", tz="Europe/Paris", unit="ns"),
    "spans": lambda n: pd.to_timedelta(np.arange(n), unit="s"),
    "periods": lambda n: pd.period_range("2020-01", periods=n, freq="M"),
}
INDEXES: dict[str, Callable[[int], pd.Index]] = {
    "range": lambda n: pd.RangeIndex(5, 5 + 2 * n, 2, name="at"),
    "strings": lambda n: pd.Index([f"k{i}" for i in range(n)], dtype="str"),
    "times": lambda n: pd.DatetimeIndex(pd.date_range("2020", periods=n), freq=None, name="numbers"),
    "two levels": lambda n: pd.MultiIndex.from_arrays(
        [np.arange(n) // 2, pd.array([f"k{i}" for i in range(n)], dtype="str")], names=["a", None]
    ),
}


@ROUND_TRIPS
@given(
    rows=st.integers(0, 9),
    columns=st.lists(st.sampled_from(sorted(COLUMNS)), unique=True, max_size=6),
    index=st.sampled_from(sorted(INDEXES)),
)
def test_frames_are_read_as_written(make: Callable[..., Spool], rows: int, columns: list[str], index: str) -> None:
    frame = pd.DataFrame({name: COLUMNS[name](rows) for name in columns}, index=INDEXES[index](rows))
    with make() as spool:
        with spool.writer("train") as writer:
            writer.frame("X", frame)
        assert writer.nbytes == (spool.path / "train" / "X").stat().st_size
        pd.testing.assert_frame_equal(read_frame(spool.path / "train" / "X"), frame)


@pytest.mark.parametrize("names", [[0, 1], [("a", "x"), ("a", "y")], ["", "ü/"]], ids=str)
def test_columns_keep_their_names(make: Callable[..., Spool], names: list[Any]) -> None:
    frame = pd.DataFrame([[1.0, 2.0]], columns=pd.Index(names))
    with make().writer("train") as writer:
        writer.frame("X", frame)
    pd.testing.assert_frame_equal(read_frame(writer_path(writer, "X")), frame)


def test_series_and_indexes_are_frames_of_their_values(make: Callable[..., Spool]) -> None:
    series = pd.Series([1.5, np.nan], index=["a", "b"], name="y")
    index = pd.MultiIndex.from_arrays([[1, 2], ["x", "y"]], names=["i", "j"])
    with make().writer("train") as writer:
        writer.frame("y", series)
        writer.frame("index", index)
    pd.testing.assert_series_equal(read_frame(writer_path(writer, "y"))["y"], series)
    pd.testing.assert_frame_equal(read_frame(writer_path(writer, "index")), index.to_frame(index=False))


def test_floats_with_nan_are_mapped_not_copied(make: Callable[..., Spool]) -> None:
    import pyarrow

    frame = pd.DataFrame({"a": np.where(np.arange(MiB) % 2, np.nan, 1.0), "b": np.arange(MiB)})
    with make().writer("train") as writer:
        writer.frame("X", frame)
    before = pyarrow.total_allocated_bytes()
    read = read_frame(writer_path(writer, "X"))
    assert pyarrow.total_allocated_bytes() - before < MiB
    assert not any(read[name].to_numpy().flags.owndata for name in read)
    pd.testing.assert_frame_equal(read, frame)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"good": [1, 2], "mixed": [1, "a"]}),
        pd.DataFrame({"good": [1], "mixed": [1j]}),
        pd.DataFrame([[1, 2]], columns=["mixed", "mixed"]),
    ],
    ids=["mixed", "complex", "twice"],
)
def test_a_column_arrow_does_not_know_is_named(make: Callable[..., Spool], frame: pd.DataFrame) -> None:
    spool = make()
    with pytest.raises(DataError, match=r"feed 'train', file 'X'.*(mixed|complex)"), spool.writer("train") as writer:
        writer.frame("X", frame)
    assert not list(spool.path.glob("*train*"))


# Where it goes


def test_what_the_budget_leaves_out_goes_to_disk_and_it_is_said_once(
    make: Callable[..., Spool], places: tuple[Path, Path]
) -> None:
    said: list[str] = []
    spool: Spool = make(budget=lambda: 3000 - spool.nbytes, told=said.append)
    parts = [np.full(100, i, dtype="float64") for i in range(6)]
    frame = pd.DataFrame({"a": ["x", None]})
    with spool.writer("train") as writer:
        for i, part in enumerate(parts):
            writer.array(f"X-{i}", part)
        writer.frame("meta", frame)
    assert (writer.nbytes - writer.overflowed, spool.nbytes) == (2400, 2400)
    assert len(said) == 1
    assert "'train'" in said[0]
    assert "2.34 kiB are in memory" in said[0]
    assert "memory limit leaves 600 B" in said[0]
    assert str(places[1]) in said[0]
    for i, part in enumerate(parts):
        path = spool.path / "train" / f"X-{i}"
        assert path.is_symlink() == (i >= 3)
        np.testing.assert_array_equal(read_array(path, "float64", (100,)), part)
    pd.testing.assert_frame_equal(read_frame(spool.path / "train" / "meta"), frame)
    with spool.writer("more") as writer:
        writer.array("X", parts[0])
    assert len(said) == 2
    spool.drop("train")
    assert spool.nbytes == 0
    with spool.writer("again") as writer:
        writer.array("X", parts[0])
    assert writer.overflowed == 0
    assert len(said) == 2


def test_no_budget_means_disk(make: Callable[..., Spool], places: tuple[Path, Path]) -> None:
    said: list[str] = []
    spool = make(budget=lambda: 0, told=said.append)
    with spool.writer("train") as writer:
        for i in range(3):
            writer.array(f"X-{i}", np.arange(10))
    assert writer.overflowed == writer.nbytes == 240
    assert len(said) == 1
    assert read_array(spool.path / "train" / "X-2", "int64", (10,)).tolist() == list(range(10))
    assert not nothing_left(places[1])
    spool.drop("train")
    assert [path.name for path in (places[1] / home_name()).glob("*.disk/*")] == [".lock"]


def test_a_tmpfs_keeps_some_room_for_others(tmpfs: Path, make: Callable[..., Spool]) -> None:
    said: list[str] = []
    spool = make(base=tmpfs, told=said.append)
    with spool.writer("train") as writer:
        for i in range(5):
            writer.array(f"X-{i}", np.zeros(MiB, "uint8"))
    assert writer.overflowed == 2 * MiB
    assert "to spare" in said[0]


def fill(folder: Path, leave: int = 0) -> int:
    """Fill a file system, as others may at any time, but for some bytes; says that there is budget."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - leave)
    return 2**40


@pytest.mark.parametrize("write", ["array", "frame"])
def test_a_file_that_fills_the_tmpfs_half_written_is_written_on_disk(
    tmpfs: Path, make: Callable[..., Spool], write: str
) -> None:
    said: list[str] = []
    array = np.random.default_rng(0).normal(size=MiB // 4)
    content = array if write == "array" else pd.DataFrame({"a": array})
    # After the spool has seen that there is room: it asks for the budget last.
    spool = make(base=tmpfs, told=said.append, budget=lambda: fill(tmpfs, MiB))
    with spool.writer("train") as writer:
        getattr(writer, write)("X", content)
        assert os.statvfs(tmpfs).f_bfree * os.statvfs(tmpfs).f_bsize > 0.98 * MiB
    assert len(said) == 1
    assert f"{tmpfs} is full" in said[0]
    assert writer.nbytes == writer.overflowed >= array.nbytes
    assert spool.nbytes == 0
    assert [path.name for path in (spool.path / "train").iterdir()] == ["X"]
    path = spool.path / "train" / "X"
    read = read_array(path, "float64", array.shape) if write == "array" else read_frame(path)["a"].to_numpy()
    np.testing.assert_array_equal(read, array)


def test_a_tmpfs_that_is_full_from_the_start_is_done_without(tmpfs: Path, make: Callable[..., Spool]) -> None:
    fill(tmpfs)
    array = np.arange(MiB)
    spool = make(base=tmpfs)
    with spool.writer("train") as writer:
        writer.array("X", array)
    assert writer.overflowed == array.nbytes
    np.testing.assert_array_equal(read_array(spool.path / "train" / "X", "int64", array.shape), array)


def test_where_both_are_full_the_feed_is_gone_and_both_are_named(
    tmpfs: Path, make: Callable[..., Spool], places: tuple[Path, Path]
) -> None:
    spool = make(base=places[0], overflow=tmpfs, budget=lambda: 100)
    array = np.zeros(MiB)
    neither = r"'X' of 8.00 MiB: it fits neither in memory, at .*/memory/.*, nor on disk, at .*/tmpfs/"
    with pytest.raises(DataError, match=neither) as raised:
        write(spool, small=array[:10], X=array)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert os.statvfs(tmpfs).f_bfree * os.statvfs(tmpfs).f_bsize > 3.9 * MiB
    assert spool.nbytes == 0
    assert not list(spool.path.glob("*train*"))
    write(spool, small=array[:10])


def test_without_a_tmpfs_all_goes_to_disk(
    make: Callable[..., Spool], places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = places
    monkeypatch.setattr("dask_bridges.processes.spool.MEMORY", memory / "none")
    said: list[str] = []
    spool = make(base=None, told=said.append)
    with spool.writer("train") as writer:
        writer.array("X", np.arange(5))
    assert disk in spool.path.parents
    assert "is not a tmpfs" in said[0]
    assert read_array(spool.path / "train" / "X", "int64", (5,)).tolist() == [0, 1, 2, 3, 4]


def test_the_default_is_this_machines_tmpfs(places: tuple[Path, Path]) -> None:
    with Spool("test", budget=lambda: MiB, overflow=places[1]) as spool, spool.writer("train") as writer:
        writer.array("X", np.arange(5))
        assert spool.path.parent.parent == Path("/dev/shm")
        assert writer.overflowed == 0
    assert not spool.path.exists()


# Feeds, whole or absent


def test_a_feed_appears_when_it_is_whole(make: Callable[..., Spool]) -> None:
    spool = make()
    with spool.writer("train") as writer:
        writer.array("X", np.zeros(3))
        assert not (spool.path / "train").exists()
    assert [path.name for path in (spool.path / "train").iterdir()] == ["X"]


@pytest.mark.parametrize("budget", [0, MiB])
def test_a_failed_feed_leaves_nothing(make: Callable[..., Spool], places: tuple[Path, Path], budget: int) -> None:
    spool = make(budget=lambda: budget)
    with pytest.raises(ZeroDivisionError):
        write(spool, X=np.zeros(3), fails=lambda writer: 1 // 0)
    assert spool.nbytes == 0
    assert not [path for place in places for path in place.rglob("*train*")]


def test_names_are_checked_and_never_taken_twice(make: Callable[..., Spool]) -> None:
    spool = make()
    with spool.writer("train") as writer:
        writer.array("X", np.zeros(3))
        with pytest.raises(DataError, match="'train' has a file 'X' already"):
            writer.array("X", np.zeros(3))
    with pytest.raises(DataError, match="a feed 'train' already"), spool.writer("train"):
        pass
    assert (spool.path / "train" / "X").exists()
    for name in ("", ".x", "a/b", "x" * 201):
        with pytest.raises(DataError, match="cannot be the name of a feed"), spool.writer(name):
            pass
        with pytest.raises(DataError, match="cannot be the name of a file"), spool.writer("other") as writer:
            writer.array(name, np.zeros(3))


def test_two_writers_of_one_feed_the_second_fails_and_the_first_stays(make: Callable[..., Spool]) -> None:
    spool = make()
    with pytest.raises(DataError, match="a feed 'train' already"):
        write(spool, X=np.zeros(3), meanwhile=lambda writer: write(spool, X=np.ones(3)))
    assert read_array(spool.path / "train" / "X", "float64", (3,)).tolist() == [1, 1, 1]


def test_closing_under_a_writer_leaves_nothing_and_says_so(make: Callable[..., Spool]) -> None:
    spool = make()
    with pytest.raises(BridgeError, match=r"the spool .* is closed"):
        write(spool, X=np.zeros(3), closes=lambda writer: spool.close(), Y=np.zeros(3))
    spool.close()
    spool.drop("train")
    assert not spool.path.exists()


def test_many_threads_write_one_feed(make: Callable[..., Spool]) -> None:
    spool: Spool = make(budget=lambda: 50_000 - spool.nbytes)
    with spool.writer("train") as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: writer.array(f"X-{i}", np.full(100, i)), range(200)))
    assert writer.nbytes == 160_000
    assert spool.nbytes == writer.nbytes - writer.overflowed
    assert 40_000 < spool.nbytes <= 50_000
    for i in range(200):
        assert read_array(spool.path / "train" / f"X-{i}", "int64", (100,)).tolist() == [i] * 100


# Who may read it


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_all_is_private_to_the_user(make: Callable[..., Spool], places: tuple[Path, Path], umask: int) -> None:
    places[1].mkdir()
    before = os.umask(umask)
    try:
        spool: Spool = make(budget=lambda: 100 - spool.nbytes)
        with spool.writer("train") as writer:
            writer.array("X", np.zeros(3))
            writer.frame("Y", pd.DataFrame({"a": [1]}))
    finally:
        os.umask(before)
    assert writer.overflowed > 0
    for place in places:
        for path in (place / home_name(), *(place / home_name()).rglob("*")):
            if not path.is_symlink():
                assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_home_that_is_a_link_is_refused(make: Callable[..., Spool], places: tuple[Path, Path]) -> None:
    elsewhere = places[0] / "elsewhere"
    elsewhere.mkdir()
    (places[0] / home_name()).symlink_to(elsewhere)
    with pytest.raises(BridgeError, match=r"dask-bridges-\d+ is a symbolic link: others could read"):
        make()
    assert list(elsewhere.iterdir()) == []
    (places[0] / home_name()).unlink()


def test_a_home_of_another_user_is_refused(make: Callable[..., Spool], places: tuple[Path, Path]) -> None:
    (places[0] / home_name()).mkdir(0o777)
    try:
        os.chown(places[0] / home_name(), 12345, 12345)
    except PermissionError as error:
        pytest.skip(f"no folder can be given to another user: {error}")
    with pytest.raises(BridgeError, match=r"not a folder of user \d+"):
        make()


CHILD = """
import os, sys
import numpy as np
from dask_bridges.processes.spool import read_array, read_frame
at = f"/proc/self/fd/{sys.argv[1]}/train"
print(sorted(os.listdir(at)), read_array(f"{at}/X", "<i8", (2, 3)).tolist(), read_array(f"{at}/Z", "<i8", (9,)).sum(),
      read_frame(f"{at}/F")["a"].tolist())
"""


def test_a_child_reads_it_through_a_descriptor(make: Callable[..., Spool], tmp_path: Path) -> None:
    spool: Spool = make(budget=lambda: 100 - spool.nbytes)
    with spool.writer("train") as writer:
        writer.array("X", np.arange(6, dtype=">i8").reshape(2, 3))
        writer.array("Z", np.arange(9))
        writer.frame("F", pd.DataFrame({"a": ["x", "ü"]}))
    assert [(spool.path / "train" / name).is_symlink() for name in "XZF"] == [False, True, True]
    folder = os.open(spool.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        said = subprocess.check_output(
            [sys.executable, "-c", CHILD, str(folder)], pass_fds=[folder], cwd=tmp_path, text=True
        )
    finally:
        os.close(folder)
    assert said.strip() == "['F', 'X', 'Z'] [[0, 1, 2], [3, 4, 5]] 36 ['x', 'ü']"


def test_what_a_child_has_mapped_stays_readable(make: Callable[..., Spool]) -> None:
    spool = make()
    with spool.writer("train") as writer:
        writer.array("X", np.arange(5))
    read = read_array(spool.path / "train" / "X", "int64", (5,))
    spool.drop("train")
    assert not (spool.path / "train").exists()
    spool.close()
    assert read.tolist() == [0, 1, 2, 3, 4]


# After a crash

OWNER = """
import os, sys
import numpy as np
from dask_bridges.processes.spool import Spool
memory, disk, how = sys.argv[1:]
spool = Spool("owner", base=memory, overflow=disk, budget=lambda: 100 - spool.nbytes, told=lambda text: None)
with spool.writer("train") as writer:
    writer.array("X", np.arange(10))
    writer.array("Y", np.arange(10))
if how == "forks" and os.fork() == 0:
    sys.exit()
if how == "writes":
    unfinished = spool.writer("test")
    unfinished.__enter__().array("X", np.arange(10))
print(spool.path, flush=True)
if how == "exits":
    sys.exit()
sys.stdin.read()
"""


@contextlib.contextmanager
def owner(memory: Path, disk: Path, how: str = "stays") -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Another process with a spool."""
    command = [sys.executable, "-c", OWNER, str(memory), str(disk), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield Path(process.stdout.readline().strip()), process
        process.kill()


@pytest.mark.parametrize("how", ["stays", "writes"])
def test_the_spool_of_a_killed_owner_goes_with_the_next(
    make: Callable[..., Spool], places: tuple[Path, Path], how: str
) -> None:
    with owner(*places, how) as (path, process):
        make().close()
        assert (path / "train" / "Y").read_bytes() == np.arange(10).tobytes()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (path / "train" / "Y").exists()
        make(overflow=places[1] / "another one")
        assert not path.exists()
        assert nothing_left(places[1])


def test_overflow_goes_also_where_memory_was_lost_with_the_machine(
    make: Callable[..., Spool], places: tuple[Path, Path]
) -> None:
    import shutil

    with owner(*places) as (path, process):
        process.kill()
        process.wait()
        shutil.rmtree(path)
        assert not nothing_left(places[1])
        make()
        assert nothing_left(places[1])


def test_an_owner_that_ends_leaves_nothing(places: tuple[Path, Path]) -> None:
    with owner(*places, "exits") as (path, process):
        assert process.wait() == 0
        assert not path.exists()
        assert nothing_left(*places)


def test_a_forked_copy_of_the_owner_removes_nothing(places: tuple[Path, Path]) -> None:
    with owner(*places, "forks") as (path, process):
        assert process.stdin
        assert (path / "train" / "Y").exists()
        process.stdin.close()
        assert process.wait() == 0
        assert not path.exists()


def test_a_removal_that_was_cut_short_is_finished(make: Callable[..., Spool], places: tuple[Path, Path]) -> None:
    home = places[0] / home_name()
    (home / ".half" / "train").mkdir(parents=True)
    (home / ".half" / "train" / "X").write_bytes(b"x")
    make()
    assert not (home / ".half").exists()


def test_nothing_is_removed_through_a_strange_link(make: Callable[..., Spool], places: tuple[Path, Path]) -> None:
    precious = places[1] / "precious"
    precious.mkdir(parents=True)
    (precious / "photo").write_text("me")
    crashed = places[0] / home_name() / "crashed"
    crashed.mkdir(parents=True)
    (crashed / ".lock").touch()
    (crashed / ".beside").symlink_to(precious)
    make()
    assert not crashed.exists()
    assert (precious / "photo").read_text() == "me"
    (precious / "photo").unlink()


def test_spools_made_and_swept_at_the_same_time_are_whole(places: tuple[Path, Path]) -> None:
    memory, disk = places
    stop = threading.Event()

    def sweep_on() -> int:
        times = 0
        while not stop.is_set():
            sweep(memory, disk)
            times += 1
        return times

    def spool(number: int) -> None:
        with Spool(
            "test", budget=lambda: 100 * (number % 2), overflow=disk, base=memory, told=lambda text: None
        ) as spool:
            for feed in ("a", "b"):
                with spool.writer(feed) as writer:
                    writer.array("X", np.full(5, number))
            for feed in ("a", "b"):
                assert read_array(spool.path / feed / "X", "int64", (5,)).tolist() == [number] * 5
            folder = spool.path
        assert not folder.exists()

    with ThreadPoolExecutor(6) as pool:
        sweepers = [pool.submit(sweep_on) for _ in range(2)]
        try:
            list(pool.map(spool, range(200)))
        finally:
            stop.set()
        assert all(sweeper.result() for sweeper in sweepers)
    assert nothing_left(memory, disk)


@given(abandoned=st.integers(1, 8), sweepers=st.integers(2, 4))
@settings(deadline=None, max_examples=20)
def test_several_sweepers_leave_the_held_and_remove_the_rest(abandoned: int, sweepers: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        memory, disk = Path(scratch, "memory"), Path(scratch, "disk")
        memory.mkdir()
        with Spool("held", budget=lambda: 0, overflow=disk, base=memory, told=lambda text: None) as held:
            with held.writer("train") as writer:
                writer.array("X", np.arange(5))
            for place in (memory, disk):
                for number in range(abandoned):
                    folder = place / home_name() / f"crashed-{number}"
                    (folder / "train").mkdir(parents=True)
                    (folder / ".lock").touch()
                    (folder / "train" / "X").write_bytes(b"x")
            with ThreadPoolExecutor(sweepers) as pool:
                list(pool.map(lambda _: sweep(memory, disk), range(sweepers)))
            assert not [path for place in (memory, disk) for path in place.rglob("*crashed*")]
            assert read_array(held.path / "train" / "X", "int64", (5,)).tolist() == [0, 1, 2, 3, 4]
