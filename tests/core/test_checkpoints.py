"""Checkpoints are whole or absent: whoever is killed, whatever is damaged, however many save at once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_bridges import BridgeError, DataError, PlacementError, checkpoints
from dask_bridges.checkpoints import Checkpoint, Checkpoints

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs what Linux says of files and processes")


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place of each kind, where nothing is yet."""
    if request.param != "memory":
        prefix = "" if request.param == "path" else "file://"
        yield f"{prefix}{tmp_path}/runs/run-1"
        return
    import fsspec

    place = f"memory://{uuid.uuid4().hex}/run-1"
    yield place
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(place, recursive=True)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def data(folder: Path, step: int, number: int = 0) -> Path:
    """A data file of a step."""
    (found,) = folder.glob(f"data-{step:012d}-*/{number}")
    return found


# What is saved is what is loaded

jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 10**14),
    files=st.dictionaries(st.text(), st.binary(max_size=200), max_size=4),
    meta=st.dictionaries(st.text(), jsons, max_size=3),
)
def test_what_is_saved_is_loaded(url: str, step: int, files: dict[str, bytes], meta: dict[str, Any]) -> None:
    store = Checkpoints(f"{url}/{uuid.uuid4().hex}")
    store.save(step, files, meta)
    assert store.load() == store.load(step) == Checkpoint(step, files, meta)
    assert store.steps() == [step] == [store.latest()]


def test_anything_like_bytes_can_be_saved(url: str) -> None:
    store = Checkpoints(url)
    numbers = np.arange(6.0).reshape(2, 3)
    store.save(
        np.int64(3),  # type: ignore[arg-type]  # steps come from NumPy, too
        {"array": numbers, "none": np.empty((0, 3)), "bytearray": bytearray(b"ab"), "view": memoryview(b"abcd")[1:3]},
    )
    loaded = store.load(3)
    assert loaded.files == {"array": numbers.tobytes(), "none": b"", "bytearray": b"ab", "view": b"bc"}
    assert loaded.meta == {}


def test_an_empty_place_has_no_checkpoint(url: str) -> None:
    store = Checkpoints(url)
    assert store.steps() == []
    assert store.latest() is None
    with pytest.raises(BridgeError, match=r"there is no checkpoint at .* that is whole"):
        store.load()
    with pytest.raises(BridgeError, match=r"checkpoint 5 at .* cannot be loaded: it is not there.*There are \[\]"):
        store.load(5)


def test_the_same_step_again_replaces_it(url: str) -> None:
    store = Checkpoints(url)
    store.save(1, {"a": b"old", "b": b"old"}, {"try": 1})
    store.save(1, {"a": b"new"}, {"try": 2})
    assert store.load() == Checkpoint(1, {"a": b"new"}, {"try": 2})
    assert store.steps() == [1]
    assert len([name for name in store._names() if name.startswith("data-")]) == 1


def test_the_newest_are_kept(url: str) -> None:
    store = Checkpoints(url, keep=2)
    for step in (5, 10, 15, 100):
        store.save(step, {"a": bytes([step])})
    assert store.steps() == [15, 100]
    assert len(store._names()) == 4
    assert store.load(15).files == {"a": b"\x0f"}


def test_what_was_just_saved_is_kept_beside_newer_ones(url: str) -> None:
    store = Checkpoints(url, keep=1)
    store.save(100, {"a": b"x"})
    store.save(10, {"a": b"y"})
    assert store.steps() == [10, 100]
    store.save(11, {"a": b"z"})
    assert store.steps() == [11, 100]


def test_it_travels_to_members(url: str) -> None:
    store = pickle.loads(pickle.dumps(Checkpoints(url, keep=3)))
    store.save(1, {"a": b"x"})
    assert Checkpoints(url).load().files == {"a": b"x"}
    assert store.keep == 3


@pytest.mark.parametrize(
    ("step", "files", "meta", "message"),
    [
        (1, {}, {"loss": np.float32(1)}, "meta data of checkpoint 1 cannot be JSON.*float32.*float\\(\\)"),
        (1, {"w": "text"}, {}, "file 'w' of a checkpoint has to be bytes"),
        (1, {3: b""}, {}, "file 3 of a checkpoint: its name is not a string"),
        (-1, {}, {}, "counted from 0"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, step: int, files: Any, meta: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Checkpoints(tmp_path / "run").save(step, files, meta)
    assert not (tmp_path / "run").exists()


# Places


def test_an_unknown_protocol_is_refused_at_once() -> None:
    with pytest.raises(PlacementError, match=r"nowhere://bucket/run: .*Protocol not known: nowhere.*package installed"):
        Checkpoints("nowhere://bucket/run")


def test_passwords_are_not_told() -> None:
    with pytest.raises(PlacementError) as raised:
        Checkpoints("nowhere://me:secret@host/run")
    assert "secret" not in str(raised.value)


def test_a_place_that_can_be_written_to_passes_the_check(url: str) -> None:
    store = Checkpoints(url)
    store.check()
    store.check()
    assert store._names() == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_place_that_cannot_be_written_to_is_found_by_the_check(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(PlacementError, match=r"cannot be written to .*/taken/run from .*Choose a folder or bucket"):
        Checkpoints(f"{prefix}{tmp_path}/taken/run").check()


@linux
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no full file system, since no tmpfs can be mounted: {mount.stderr.strip()}")
    try:
        store = Checkpoints(tmp_path)
        store.save(1, {"a": b"x", "b": b"y" * 300_000})
        before = files_in(tmp_path)
        with pytest.raises(BridgeError, match=r"checkpoint 1 could not be saved to .*No space left on device"):
            store.save(1, {"a": b"new", "b": b"z" * 900_000})
        assert files_in(tmp_path) == before
        assert store.load().files == {"a": b"x", "b": b"y" * 300_000}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@linux
@pytest.mark.parametrize("umask", [0, 0o022])
def test_local_files_are_private(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Checkpoints(tmp_path / "runs" / "one").save(1, {"a": b"x"})
    finally:
        os.umask(before)
    for path in [tmp_path / "runs" / "one", *(tmp_path / "runs" / "one").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what"), [(Path.unlink, "is missing"), (cut, "has 2 bytes, of 3"), (flip, "its checksum differs")]
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_file_makes_the_older_one_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], what: str, number: int
) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"a": b"one", "b": b"One"})
    store.save(2, {"a": b"two", "b": b"Two"})
    damage(data(tmp_path, 2, number))
    with caplog.at_level(logging.WARNING):
        assert store.latest() == 1
        assert store.load().files == {"a": b"one", "b": b"One"}
    warning = caplog.records[0].getMessage()
    assert "checkpoint 2 at" in warning
    assert f"file {'ab'[number]!r}" in warning
    assert what in warning
    with pytest.raises(BridgeError, match=f"checkpoint 2 at .*file {'ab'[number]!r} .*{what}.*saving this step again"):
        store.load(2)
    store.save(2, {"a": b"2"})
    assert store.load().files == {"a": b"2"}


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_text("{}"), lambda path: path.write_text("[1]")])
def test_a_damaged_manifest_makes_the_older_one_the_newest(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"a": b"one"})
    store.save(2, {"a": b"two"}, {"loss": 0.123456})
    damage(tmp_path / "checkpoint-000000000002.json")
    assert store.latest() == 1
    assert store.steps() == [1]
    with pytest.raises(BridgeError, match=r"checkpoint 2 at .* cannot be loaded: its manifest is damaged"):
        store.load(2)


@given(bit=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_no_flipped_bit_of_a_manifest_gives_other_data(bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Checkpoints(folder)
        store.save(2, {"a": b"two"}, {"loss": 0.123456})
        path = Path(folder, "checkpoint-000000000002.json")
        content = bytearray(path.read_bytes())
        content[bit // 8 % len(content)] ^= 1 << bit % 8
        path.write_bytes(content)
        with contextlib.suppress(BridgeError):
            assert store.load() == Checkpoint(2, {"a": b"two"}, {"loss": 0.123456})


def test_a_manifest_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"a": b"one"})
    store.save(2, {"a": b"two"})
    path = tmp_path / "checkpoint-000000000002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(BridgeError, match="version 99, of another dask-bridges"):
        store.load(2)
    assert store.load().step == 1


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, {"a": bytes([step])})
    data(tmp_path, 3).unlink()
    store.save(4, {"a": b"4"})
    assert store.steps() == [2, 4]
    store.save(5, {"a": b"5"})
    assert store.steps() == [4, 5]
    assert len(store._names()) == 4


def test_everything_damaged_is_told(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"a": b"one"})
    flip(data(tmp_path, 1))
    assert store.latest() is None
    with pytest.raises(BridgeError, match=r"no checkpoint at .* that is whole"):
        store.load()


# Crashes

SAVES = """
import sys
from dask_bridges.checkpoints import Checkpoints
url, files, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Checkpoints(url, keep=2)
first = (store.latest() or 0) + 1
for step in range(first, first + 10_000):
    print(step, flush=True)
    store.save(step, {f"{name}": f"{name}:{step}".encode() * size for name in range(files)}, {"step": step})
"""


@linux
@pytest.mark.parametrize(
    ("place", "files", "size", "calls"),
    # Few and large, on disk: the time goes into writing. Many and small, in memory: as much into removing.
    [(None, 4, 20_000, 60), pytest.param("/dev/shm", 300, 1, 3000, marks=pytest.mark.slow)],
    ids=["large", "many"],
)
def test_savers_killed_at_any_moment_leave_whole_checkpoints(
    place: str | None, files: int, size: int, calls: int
) -> None:
    with tempfile.TemporaryDirectory(dir=place) as url:
        reached, store = 0, Checkpoints(url)
        command = [sys.executable, "-c", SAVES, url, str(files), str(size)]
        for kill in range(12):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout
                for _ in range(3 + kill % 3):
                    reached = int(process.stdout.readline())
                for _ in range(kill * calls):  # some way into the save that has just begun
                    os.stat(url)
                process.kill()
            checkpoint = store.load()
            assert checkpoint.step >= reached - 1
            assert checkpoint.meta == {"step": checkpoint.step}
            assert checkpoint.files == {f"{name}": f"{name}:{checkpoint.step}".encode() * size for name in range(files)}
            published = [path.name for path in Path(url).glob("checkpoint-*")]
            assert len(published) == len(store.steps()) >= 2


@pytest.fixture
def leftovers(tmp_path: Path) -> list[Path]:
    """What crashed saves leave."""
    folder = tmp_path / "data-000000000007-0123456789ab"
    folder.mkdir()
    (folder / "0").write_bytes(b"x")
    empty = tmp_path / "data-000000000008-0123456789ab"
    empty.mkdir()
    manifest = tmp_path / ".checkpoint-000000000007.json.0123456789ab"
    manifest.write_bytes(b"{")
    return [folder / "0", folder, empty, manifest]


def age(paths: list[Path], by: timedelta) -> None:
    for path in paths:
        at = path.stat().st_mtime - by.total_seconds()
        os.utime(path, (at, at))


def test_old_leftovers_of_crashes_go_with_a_later_save(tmp_path: Path, leftovers: list[Path]) -> None:
    age(leftovers, 1.1 * checkpoints.LEFT_ALONE)
    Checkpoints(tmp_path).save(9, {"a": b"x"})
    assert [path for path in leftovers if path.exists()] == []
    assert Checkpoints(tmp_path).load().step == 9


def test_what_another_writer_may_be_saving_is_left_alone(tmp_path: Path, leftovers: list[Path]) -> None:
    age(leftovers[1:], 2 * checkpoints.LEFT_ALONE)  # but for the file itself, which is being written
    Checkpoints(tmp_path).save(9, {"a": b"x"})
    assert leftovers[0].exists()


def test_old_checkpoints_that_are_kept_are_no_leftovers(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, {"a": b"x"})
    age(list(tmp_path.rglob("*")), 2 * checkpoints.LEFT_ALONE)
    store.save(2, {"a": b"y"})
    assert store.load(1).files == {"a": b"x"}


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "database").mkdir()
    age([tmp_path / "notes.txt", tmp_path / "database"], 2 * checkpoints.LEFT_ALONE)
    Checkpoints(tmp_path).save(9, {"a": b"x"})
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "database").exists()


# Many at once


def test_readers_beside_writers_always_get_a_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = str(tmp_path)  # fsspec's memory:// cannot be listed while others write
    Checkpoints(url, keep=1).save(0, {"a": b"0", "b": b"0"}, {"of": "0"})
    stop = threading.Event()

    def write(steps: range) -> None:
        store = Checkpoints(url, keep=1)
        for step in steps:
            text = str(step).encode() * 1000
            store.save(step, {"a": text, "b": text}, {"of": str(step)})

    def read() -> int:
        store, times = Checkpoints(url), 0
        while not stop.is_set() or not times:
            loaded = store.load()
            assert loaded.files["a"] == loaded.files["b"]
            assert loaded.files["a"].decode().startswith(loaded.meta["of"])
            assert store.latest() is not None
            times += 1
        return times

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for writer in [pool.submit(write, range(1, 60, 2)), pool.submit(write, range(2, 60, 2))]:
                writer.result()
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    assert Checkpoints(url).load().step == 59
    assert not [record for record in caplog.records if "could not be removed" in record.getMessage()]


def test_one_of_the_writers_of_a_step_wins_and_readers_never_notice(tmp_path: Path) -> None:
    names = [f"part-{number}" for number in range(10)]
    stop = threading.Event()

    def write(writer: int) -> None:
        for _ in range(8):
            Checkpoints(tmp_path).save(1, {name: bytes([writer]) for name in names}, {"writer": writer})

    def read() -> int:
        times = 0
        while not stop.is_set() or not times:
            loaded = Checkpoints(tmp_path).load(1)
            assert loaded.files == {name: bytes([loaded.meta["writer"]]) for name in names}
            times += 1
        return times

    write(0)
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            list(pool.map(write, (1, 2)))
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
