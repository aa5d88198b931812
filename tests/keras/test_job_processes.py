"""What frameworks are told in the processes of jobs, before they have used a device."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dask_bridges.jobs.setup import Setup

pytest.importorskip("keras")

LIMIT, WHOLE = 2 * 2**30, 8 * 2**30


def test_what_keras_on_torch_asks_for_makes_no_cuda_context_before_the_fork() -> None:
    assert Setup.of(["keras"]).variables["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


# Memory


def limit_on(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dask_keras` does on a backend."""
    import keras

    from dask_keras.memory import limit

    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    limit(LIMIT)


def test_tensorflow_is_told_of_each_gpu_in_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tf = pytest.importorskip("tensorflow")
    from dask_tf.memory import limit

    told: dict[str, Any] = {}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one", "other"] if kind == "GPU" else [])
    monkeypatch.setattr(tf.config, "set_logical_device_configuration", told.__setitem__)
    limit(LIMIT)
    limit_on("tensorflow", monkeypatch)  # sees to nothing itself
    assert {gpu: [each.memory_limit for each in devices] for gpu, devices in told.items()} == {
        "one": [2048],
        "other": [2048],
    }


@pytest.mark.parametrize(("whole", "share"), [(WHOLE, 0.25), (LIMIT // 2, 1.0)])
def test_torch_is_told_a_fraction_of_each_gpu(monkeypatch: pytest.MonkeyPatch, whole: int, share: float) -> None:
    told: dict[int, float] = {}
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        get_device_properties=lambda gpu: SimpleNamespace(total_memory=whole),
        set_per_process_memory_fraction=lambda fraction, gpu: told.update({gpu: fraction}),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    limit_on("torch", monkeypatch)
    assert told == {0: share, 1: share}


@pytest.mark.parametrize("visible", ["1", "GPU-b"])
def test_jax_is_told_a_fraction_of_the_gpu_that_the_process_sees(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    from dask_bridges.devices import nvml

    gpus = [nvml.GPU(0, "GPU-a", "any", 2 * WHOLE), nvml.GPU(1, "GPU-b", "any", WHOLE)]
    monkeypatch.setattr(nvml, "gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1.0")
    limit_on("jax", monkeypatch)
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.25"


def test_jax_is_left_alone_where_the_size_of_its_gpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    limit_on("jax", monkeypatch)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
