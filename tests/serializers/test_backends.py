"""The zoo, on every backend that Keras has; each in a process of its own, since Keras chooses once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ZOO = Path(__file__).parent / "zoo"
BACKENDS = ("tensorflow", "jax", "torch")


def visit(backend: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "KERAS_BACKEND": backend, "DASK_SERIALIZERS_ZOO": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    options = [
        "-q",
        "--tb=short",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "--import-mode=prepend",
        "-W",
        "ignore",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", str(ZOO), *options, "--timeout=120"],
        env=environment, cwd=ZOO.parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def visits(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All that are to be tested at once: they compile on one core each."""
    wanted = {item.callspec.params["backend"] for item in request.session.items if item.path == request.path}
    started = {backend: visit(backend) for backend in BACKENDS if backend in wanted and find_spec(backend)}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(backend, marks=pytest.mark.slow) for backend in BACKENDS[1:])]
)
def test_every_model_of_the_zoo_arrives_whole(visits: dict[str, subprocess.Popen[str]], backend: str) -> None:
    if backend not in visits:
        pytest.skip(f"{backend} is not installed")
    said, _ = visits[backend].communicate()
    assert visits[backend].returncode == 0, said[-8000:]
