"""The zoo, on every backend that Keras has; each in a process of its own, since Keras chooses once."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ZOO = Path(__file__).parent / "zoo"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_every_model_of_the_zoo_arrives_whole(backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend, "DASK_SERIALIZERS_ZOO": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ZOO),
        "-q",
        "--tb=short",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, "--import-mode=prepend", "-W", "ignore", "--timeout=120"],
        env=environment, capture_output=True, text=True, cwd=ZOO.parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
