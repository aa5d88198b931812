"""Memory for what arrives."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Memory"]

BLOCK = 2**25  # bytes
ALIGNMENT = 64  # bytes; what TensorFlow's and JAX's vector code asks for


class Memory:
    """Aligned memory for one object's arrays: large ones alone, smaller ones together in blocks.

    Fresh memory costs more than the copy into it; a block is large enough for the system's huge pages.
    """

    def __init__(self, total: int) -> None:
        self._left = total
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray[Any, Any]:
        """`size` uninitialised bytes, at a multiple of `ALIGNMENT`."""
        self._left -= size
        if size > BLOCK // 4:
            return _aligned(size)[:size]
        padded = size + -size % ALIGNMENT
        if padded > self._block.nbytes:
            self._block = _aligned(max(padded, min(BLOCK, 2 * (self._left + size))))
        taken, self._block = self._block[:size], self._block[padded:]
        return taken


def _aligned(size: int) -> np.ndarray[Any, Any]:
    memory = np.empty(size + ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % ALIGNMENT :][:size]
