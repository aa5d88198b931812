"""The contract where a member, or the worker under it, fails by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import Client

from dask_bridges import MemberFailed, MemberLost
from dask_bridges.testing.contract.base import Contract, make_data
from dask_bridges.testing.faults import (
    Dated,
    DiesOnArrival,
    Fault,
    RollCall,
    TroubleError,
    crash,
    die,
    freeze,
    leave,
    trouble,
    vanish,
    vanish_badly,
)
from dask_bridges.testing.traces import footprint, leftovers, wait_until_free, wait_until_same

__all__ = ["FailureContract"]


class FailureContract(Contract):
    """Whoever fails is named, and nothing is left."""

    def told_within(self, seconds: float, file: Path, client: Client, fault: Fault, **options: Any) -> Any:
        """Train with a fault; what comes of it must be here so many seconds after the deed, of which `file` tells."""
        X, y = make_data()
        file.unlink(missing_ok=True)
        dated = replace(fault, action=Dated(fault.action, file))
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(self.train, client, X, y, fault=dated, **options)
            while not file.exists() and not wait([training], timeout=0.02).done:
                pass
            return training.result(seconds)

    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_the_root_cause_is_raised_and_the_workers_are_free(self, bridges_client: Client, rank: int) -> None:
        X, y = make_data()
        with pytest.raises(MemberFailed, match="TroubleError: deliberate") as caught:
            self.train(bridges_client, X, y, fault=Fault(rank, 1, trouble), rounds=1000)
        assert isinstance(caught.value.__cause__, TroubleError)
        assert caught.value.rank == rank
        assert caught.value.worker in bridges_client.scheduler_info(n_workers=-1)["workers"]
        self.check(self.train(bridges_client, X, y), X, y)

    @pytest.mark.parametrize("repeats", [5, pytest.param(50, marks=pytest.mark.slow)])
    def test_the_root_cause_is_never_the_wrong_one_and_leaves_nothing(
        self, bridges_client: Client, repeats: int, tmp_path: Path
    ) -> None:
        X, y = make_data()
        self.check(self.train(bridges_client, X, y), X, y)
        before, dice = footprint(bridges_client), random.Random(repeats)
        for _ in range(repeats):
            rank, round_ = dice.randrange(3), dice.randrange(4)
            with pytest.raises(MemberFailed, match="TroubleError: deliberate") as caught:
                self.told_within(5, tmp_path / "deed", bridges_client, Fault(rank, round_, trouble), rounds=1000)
            assert caught.value.rank == rank
            assert leftovers(bridges_client) == {}
        wait_until_same(bridges_client, before, timeout=10)

    def test_sys_exit_fails_the_member_and_kills_no_worker(self, bridges_client: Client) -> None:
        X, y = make_data()
        before = set(bridges_client.scheduler_info(n_workers=-1)["workers"])
        with pytest.raises(MemberFailed, match=r"SystemExit\(0\)") as caught:
            self.train(bridges_client, X, y, fault=Fault(1, 1, leave), rounds=1000)
        gone = before - set(bridges_client.scheduler_info(n_workers=-1)["workers"])
        assert caught.value.worker not in gone
        # Of the others only those that the error itself says were restarted, stuck in the framework.
        assert all(worker in " ".join(getattr(caught.value, "__notes__", [])) for worker in gone)

    @pytest.mark.parametrize(
        ("action", "said"),
        [
            (vanish, "exit code 0|it died or left the cluster"),
            (vanish_badly, "exit code 1|exited with status 1"),
            (crash, "SIGSEGV|killed by signal 11"),
            (die, "SIGKILL|killed by signal 9"),
        ],
        ids=["os._exit(0)", "os._exit(1)", "segfault", "SIGKILL"],
    )
    def test_a_member_that_ends_without_a_result_is_lost_and_says_how(
        self, bridges_doomed_client: Client, tmp_path: Path, action: Callable[[], None], said: str
    ) -> None:
        X, y = make_data()
        roll = RollCall(tmp_path / "ran", Fault(1, 1, action))
        with pytest.raises(MemberLost, match=f"member 1 was lost.*({said})") as caught:
            self.train(bridges_doomed_client, X, y, fault=roll, rounds=1000)
        assert caught.value.rank == 1
        assert sorted(roll.ranks()) == [0, 1, 2]  # nobody ran twice
        assert leftovers(bridges_doomed_client) == {}
        self.check(self.train(bridges_doomed_client, X, y), X, y)

    @pytest.mark.slow  # Dask takes its time to compute them elsewhere
    def test_a_worker_killed_while_partitions_are_computed_costs_no_result(
        self, bridges_doomed_client: Client, tmp_path: Path
    ) -> None:
        X, y = make_data()
        deadly = X.map_blocks(_die_once, str(tmp_path / "died"), dtype=X.dtype, meta=X._meta)
        result = self.train(bridges_doomed_client, deadly, y)
        assert (tmp_path / "died").exists()
        self.check(result, X, y)

    def test_a_worker_killed_while_its_member_starts_is_named(self, bridges_doomed_client: Client) -> None:
        X, y = make_data()
        doomed = sorted(bridges_doomed_client.scheduler_info(n_workers=-1)["workers"])[1]
        with pytest.raises(MemberLost, match=f"was lost .* {doomed}"):
            self.train(bridges_doomed_client, X, y, fault=DiesOnArrival(doomed), rounds=1000)
        wait_until_free(bridges_doomed_client, timeout=10)  # Dask may just try it elsewhere, where it is refused
        self.check(self.train(bridges_doomed_client, X, y), X, y)

    @pytest.mark.parametrize(
        ("rank", "round_", "rounds"), [(0, 1, 1000), (1, 1, 1000), (1, 2, 3)], ids=["first", "second", "last round"]
    )
    def test_a_killed_member_is_named_and_the_next_training_runs(
        self, bridges_doomed_client: Client, tmp_path: Path, rank: int, round_: int, rounds: int
    ) -> None:
        X, y = make_data()
        self.check(self.train(bridges_doomed_client, X, y), X, y)
        before = footprint(bridges_doomed_client)
        with pytest.raises(MemberLost, match=f"member {rank} was lost") as caught:
            self.told_within(10, tmp_path / "deed", bridges_doomed_client, Fault(rank, round_, die), rounds=rounds)
        assert caught.value.worker in str(caught.value)
        assert leftovers(bridges_doomed_client) == {}
        wait_until_same(bridges_doomed_client, before, timeout=10)
        self.check(self.train(bridges_doomed_client, X, y), X, y)

    def test_a_frozen_member_is_found_and_the_next_training_runs(self, bridges_doomed_client: Client) -> None:
        X, y = make_data()
        frozen = "was frozen: no heartbeat .* and no processor time used"
        with dask.config.set({"dask-bridges.hang-timeout": "2s"}), pytest.raises(MemberLost, match=frozen) as caught:
            self.train(bridges_doomed_client, X, y, fault=Fault(1, 1, freeze), rounds=1000)
        assert caught.value.rank == 1
        assert leftovers(bridges_doomed_client) == {}
        self.check(self.train(bridges_doomed_client, X, y), X, y)


def _die_once(block: Any, marker: str, block_info: Any = None) -> Any:
    """Kill the worker of the third partition, the first time."""
    if block_info and block_info[0]["chunk-location"][0] == 3 and not Path(marker).exists():
        Path(marker).touch()
        die()
    return block
