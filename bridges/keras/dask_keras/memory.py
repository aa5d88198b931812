"""How much memory Keras takes of the GPUs that a process sees, on backends that have no bridge of their own."""

from __future__ import annotations

import os

import keras

__all__ = ["limit"]


def limit(memory: int) -> None:
    """Take at most `memory` bytes of each GPU; before the backend has used one. TensorFlow's bridge sees to its own."""
    if keras.backend.backend() == "torch":
        import torch

        for gpu in range(torch.cuda.device_count()):
            whole = torch.cuda.get_device_properties(gpu).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory / whole), gpu)
    elif keras.backend.backend() == "jax":
        from dask_bridges.devices import nvml

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        whole = max((gpu.memory for gpu in nvml.gpus() if {gpu.uuid, str(gpu.index)} & set(visible)), default=0)
        if whole:
            os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(min(1.0, memory / whole))
