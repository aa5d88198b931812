"""The bridge that the documentation builds keeps the contract, and what it says of other ways to work is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client

from dask_bridges import MemberFailed
from dask_bridges.testing import Fault, leftovers
from dask_bridges.testing.contract.base import make_data
from dask_bridges.testing.faults import trouble

PAGE = Path(__file__).parents[2] / "docs/writing-a-bridge.md"


def run_blocks(*containing: str) -> dict[str, Any]:
    """Run the examples of the page that contain these strings, one after another, as a program's main module."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    for text in containing:
        exec(compile(next(block for block in blocks if text in block), str(PAGE), "exec"), names)
    return names


PAGES = run_blocks("correlations.py", "class TestCorrelations")
TestCorrelations = pytest.mark.slow(PAGES["TestCorrelations"])  # XGBoost's members keep the same contract


@pytest.mark.cluster
def test_the_bridge_gives_what_numpy_gives(bridges_client: Client) -> None:
    X, y = make_data()
    PAGES["TestCorrelations"]().check(PAGES["correlations"](bridges_client, X, y, rounds=2), X, y)


@pytest.mark.cluster
def test_its_member_that_raises_is_told_with_the_cause(bridges_client: Client) -> None:
    with pytest.raises(MemberFailed, match="deliberate") as caught:
        PAGES["correlations"](bridges_client, *make_data(), fault=Fault(1, 0, trouble))
    assert caught.value.rank == 1
    assert leftovers(bridges_client) == {}


@pytest.mark.cluster
def test_the_work_in_child_processes_sums(bridges_client: Client) -> None:
    names = run_blocks("correlations.py", "run_in_child(member, work, parts)")
    names["Work"] = lambda keys, rounds, fault: keys
    X = da.arange(100, chunks=7).reshape(-1, 1)
    assert names["correlations"](bridges_client, X, X[:, 0]) == 4950


def test_large_arrays_are_summed_in_a_ring(gang: Callable[..., Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "all_reduce(gradient)" in block]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(block.partition("GangPlan(")[0], names)
    results = gang(names["work"], [np.ones(5), np.ones(5)], collateral=names["is_collective_error"])
    assert results == [[b"small", b"small"]] * 2
