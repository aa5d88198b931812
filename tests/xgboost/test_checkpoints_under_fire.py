"""Checkpoints of trainings: whole or absent whenever the writer dies, in a bucket behind HTTP, and in a long soak."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client
from tests.xgboost.losses import DiesOnce
from xgboost import collective

import dask_xgboost
from dask_bridges import MemberLost
from dask_bridges.checkpoints import Checkpoints
from dask_bridges.events import Progress
from dask_xgboost import resuming

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

WORKERS, ROWS, ROUNDS, EVERY = 2, 600, 11, 4
PARAMS = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.5, "seed": 9, "subsample": 0.5}


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    X = rng.normal(size=(ROWS, 4)).astype("float32")
    y = (X[:, 0] * X[:, 1] > 0).astype("float32")
    return da.from_array(X, chunks=(100, 4)), da.from_array(y, chunks=100)


# In a bucket


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an emulator of Google's storage, which speaks HTTP on this machine alone; workers inherit where."""
    # Newer ones of gcsfs ask for the kind of a bucket by gRPC, which emulators do not speak; read as it is imported.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True, default_bucket="trainings"
    )
    server.start()
    try:
        port = server._api._httpd.socket.getsockname()[1]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://trainings/run"
    finally:
        server.stop()


class Rounds(xgb.callback.TrainingCallback):
    """Writes down the rounds of rank 1."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        if collective.get_rank() == 1:
            with self.file.open("a") as file:
                file.write(f"{epoch}\n")
        return False


def test_a_training_that_is_killed_goes_on_from_a_bucket(bucket: str, doomed: Client, tmp_path: Path) -> None:
    matrix = dask_xgboost.DMatrix(doomed, *data())
    checkpoints = Checkpoints(bucket, storage_options={"token": "anon"})

    def train(**options: Any) -> xgb.Booster:
        options = {"num_boost_round": ROUNDS, "checkpoint_every": EVERY} | options
        return dask_xgboost.train(doomed, PARAMS, matrix, **options)

    oracle, rounds = train(), tmp_path / "rounds"
    callbacks = [DiesOnce(tmp_path / "died", rank=0, round_=EVERY + 1), Rounds(rounds)]
    with pytest.raises(MemberLost):
        train(checkpoint=checkpoints, callbacks=callbacks, max_restarts=0)
    assert checkpoints.steps() == [EVERY]
    doomed.wait_for_workers(WORKERS, timeout=60)
    rounds.unlink()
    booster = train(checkpoint=checkpoints, callbacks=callbacks)  # a later call
    assert booster.save_raw("ubj") == oracle.save_raw("ubj")
    assert [int(line) for line in rounds.read_text().split()] == [*range(EVERY, ROUNDS)]
    assert checkpoints.steps() == [EVERY, 2 * EVERY]


# Whole or absent

SAVES = """
import os, sys
import numpy as np, xgboost as xgb
from dask_bridges.checkpoints import Checkpoints
from dask_xgboost import resuming

rng = np.random.default_rng(0)
X = rng.normal(size=(500, 5)).astype("float32")
matrix = xgb.QuantileDMatrix(X, X[:, 0] * X[:, 1], nthread=1)
booster = xgb.train({"nthread": 1, "num_parallel_tree": 20}, matrix, 1)
model, config, cuts = bytes(booster.save_raw("ubj")), booster.save_config(), matrix.get_quantile_cut()
checkpoints = Checkpoints(sys.argv[1], keep=2)

def save():
    for done in range((checkpoints.latest() or 0) + 1, 1_000_000):
        history = {"train": {"rmse": [float(number) for number in range(done)]}}
        state = resuming.State(done, model, config, history, ({"rounds": done},), cuts, ((0, 1),))
        print(os.getpid(), done, flush=True)
        resuming._save(checkpoints, state, {"rows": [500]})

for _ in sys.stdin:
    writer = os.fork()
    if not writer:
        save()
    os.waitpid(writer, 0)
    print(flush=True)
"""


def killed_writers(folder: Path, dice: random.Random) -> Iterator[int]:
    """One after the other, each killed some way into the writing of a state; the round of that."""
    command = [sys.executable, "-c", SAVES, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin
        assert writers.stdout
        for _ in range(100):
            print(file=writers.stdin, flush=True)
            for _ in range(dice.randint(1, 4)):
                writer, reached = map(int, writers.stdout.readline().split())
            time.sleep(dice.uniform(0, 0.008))
            os.kill(writer, signal.SIGKILL)
            while line := writers.stdout.readline().split():
                reached = int(line[1])
            yield reached
        writers.stdin.close()


def test_a_state_whose_writer_is_killed_at_any_moment_is_whole_or_absent(tmp_path: Path) -> None:
    checkpoints, absent = Checkpoints(tmp_path), 0
    rows = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    matrix = xgb.QuantileDMatrix(rows, rows[:, 0] * rows[:, 1], nthread=1)
    model = xgb.train({"nthread": 1, "num_parallel_tree": 20}, matrix, 1)
    for reached in killed_writers(tmp_path, random.Random(7)):
        state = resuming.load(checkpoints, {"rows": [500]}, 1_000_000)
        if state is None:
            assert reached == 1
            absent += 1
            continue
        assert state.round in (reached - 1, reached)
        absent += state.round < reached
        assert state.history == {"train": {"rmse": [float(number) for number in range(state.round)]}}
        assert (state.callbacks, state.placement) == (({"rounds": state.round},), ((0, 1),))
        assert xgb.Booster(model_file=bytearray(state.model)).get_dump() == model.get_dump()
        for ours, theirs in zip(state.cuts, matrix.get_quantile_cut()):
            np.testing.assert_array_equal(ours, theirs)
    assert absent > 0  # some were killed in the middle


# A soak


class Takes(xgb.callback.TrainingCallback):
    """Makes a round take a while, so that there is something to kill."""

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        time.sleep(0.1)
        return False


class Furthest:
    """Hears how many rounds are over, in whichever attempt."""

    def __init__(self) -> None:
        self.rounds = 0

    def __call__(self, event: Any) -> None:
        if isinstance(event, Progress):
            self.rounds = max(self.rounds, event.done)


class Killer(threading.Thread):
    """Kills a worker every 5 s, for 12 times, but none before the training is further than when the last was killed.

    Two attempts that come no further end a training, and a worker that is killed while its nanny still waits for it
    does not come back: a machine on which a worker takes more than 5 s to start would show just that.
    """

    def __init__(self, client: Client, furthest: Furthest) -> None:
        super().__init__()
        self.client, self.furthest, self.over = client, furthest, threading.Event()
        self.killed: list[str] = []

    def run(self) -> None:
        dice, before = random.Random(3), 0
        for _ in range(12):
            if self.over.wait(5) or not self._further_than(before):
                return
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            pids = self.client.run(os.getpid, workers=list(workers), on_error="ignore")
            before = self.furthest.rounds
            self.killed.append(dice.choice(sorted(pids)))
            os.kill(pids[self.killed[-1]], signal.SIGKILL)

    def _further_than(self, rounds: int) -> bool:
        """Wait until it is; not when the training is over. A round may have ended as the worker was killed."""
        while self.furthest.rounds <= rounds + 1:
            if self.over.wait(0.05):
                return False
        return True


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_training_under_kills_ends_with_the_right_model(doomed: Client, tmp_path: Path, where: str) -> None:
    rounds = 300
    matrix = dask_xgboost.DMatrix(doomed, *data(), external_memory=where == "memory")
    options: Any = {"num_boost_round": rounds, "checkpoint_every": 5, "evals": [(matrix, "train")]}
    histories: list[dict[str, Any]] = [{}, {}]
    oracle = dask_xgboost.train(doomed, PARAMS, matrix, evals_result=histories[0], **options)
    furthest = Furthest()
    killer = Killer(doomed, furthest)
    killer.start()
    try:
        booster = dask_xgboost.train(
            doomed, PARAMS, matrix, callbacks=[Takes()], evals_result=histories[1], max_restarts=1000, listen=furthest,
            checkpoint=tmp_path / "kept" if where == "folder" else None, **options,
        )  # fmt: skip
    finally:
        killer.over.set()
        killer.join()
    assert len(killer.killed) >= 5
    assert booster.save_raw("ubj") == oracle.save_raw("ubj")
    assert histories[0] == histories[1]
    assert booster.num_boosted_rounds() == rounds
