"""How much memory TensorFlow takes of the GPUs that a process sees."""

from __future__ import annotations

import tensorflow as tf

__all__ = ["limit"]


def limit(memory: int) -> None:
    """Take at most `memory` bytes of each GPU; before TensorFlow has used one."""
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.set_logical_device_configuration(
            gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=memory // 2**20)]
        )
