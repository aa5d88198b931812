"""Importing costs little and loads no framework."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("xgboost", "tensorflow", "keras", "torch", "jax", "sklearn", "pandas", "dask.dataframe", "tqdm")


def measured(module: str) -> tuple[float, set[str]]:
    """Seconds of the import in a new process, and which heavy modules it loaded."""
    code = (
        "import sys, time; start = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - start, *({HEAVY!r} & sys.modules.keys()))"
    ).replace(repr(HEAVY), repr(set(HEAVY)))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = run.stdout.split()
    return float(seconds), set(loaded)


@pytest.mark.parametrize("module", ["dask_bridges", "dask_xgboost", "dask_tf", "dask_keras", "dask_serializers"])
def test_importing_takes_under_a_second_and_loads_no_framework(module: str) -> None:
    runs = [measured(module) for _ in range(3)]
    assert [loaded for _, loaded in runs] == [set()] * 3
    assert min(seconds for seconds, _ in runs) < 1.0


def test_importing_the_core_does_not_load_the_cluster() -> None:
    code = "import sys, dask_bridges; print('distributed' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
