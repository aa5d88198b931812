"""What ranks of trainings on devices do in tests, and tell; imported fast, since the process of each rank does that."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import xgboost as xgb
from tests.core.jobs_at_work import Flags
from xgboost import collective

Deed = Callable[[Flags, int, int], Any]


class Diary(xgb.callback.TrainingCallback):  # type: ignore[misc]
    """Remembers the rounds, tells on which device each rank is and in which process, and does something after each."""

    def __init__(self, flags: Flags, deed: Deed) -> None:
        self.flags, self.deed = flags, deed
        self.rounds: list[int] = []

    def before_training(self, model: Any) -> Any:
        self.rounds = []
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        rank = collective.get_rank()
        self.rounds.append(epoch)
        self.flags.set(f"rank-{rank}", f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()}")
        return bool(self.deed(self.flags, rank, epoch))


def go_on(flags: Flags, rank: int, epoch: int) -> None:
    pass


def wait(flags: Flags, rank: int, epoch: int) -> None:
    flags.wait("go")


def fail(flags: Flags, rank: int, epoch: int) -> None:
    if rank == 1:
        raise RuntimeError("deliberate")


class Dies:
    """Has rank 1 killed after a round, once, by itself or with its Dask worker."""

    def __init__(self, round_: int, *, with_worker: bool = False) -> None:
        self.round, self.with_worker = round_, with_worker

    def __call__(self, flags: Flags, rank: int, epoch: int) -> None:
        if (rank, epoch) == (1, self.round) and not (flags.folder / "died").exists():
            flags.set("died", str(os.getpid()))
            # The fork server's parent is the Dask worker.
            os.kill(psutil.Process().parent().ppid() if self.with_worker else os.getpid(), signal.SIGKILL)
            signal.pause()  # the kernel ends this process
