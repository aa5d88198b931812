"""Keras is imported without what TensorFlow's C++ code says meanwhile, here and on the workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

__all__ = ["load", "load_on_workers"]


def load() -> None:
    """Import Keras in this process.

    A remark on oneDNN is written before TensorFlow knows its own log level, so that only the descriptor of standard
    error can be kept from it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _no_stderr():
        import keras

        keras.backend.backend()


def load_on_workers(client: Client) -> None:
    """Import Keras in all workers, in a thread of theirs: their event loops go on."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    client.gather([client.submit(load, workers=[worker], pure=False) for worker in workers])


@contextmanager
def _no_stderr() -> Iterator[None]:
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
