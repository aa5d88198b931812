"""The scorer: newest weights leave the chief every few seconds, and a process of its own evaluates them.

The chief reads the weights from the servers and passes them on. A scorer that connects to the servers itself would be a
second TensorFlow client of servers that know only one, and could not name the variables.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ["Publish", "Publisher", "evaluate", "score"]

logger = logging.getLogger(__name__)

Weights = list[np.ndarray[Any, Any]]
Publish = Callable[[int, Weights], Any]


class Publisher:
    """Calls ``publish(*read())`` every `seconds` from a thread of its own, while entered, and once at the end.

    Parameters
    ----------
    read : callable
        Returns (step, weights).
    publish : callable, optional
        Without it nothing happens. One that raises is told of in the log, and is called no more.
    seconds : float
    """

    def __init__(self, read: Callable[[], tuple[int, Weights]], publish: Publish | None, seconds: float) -> None:
        self._read = read
        self._publish = publish
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dask-tf-publish", daemon=True)

    def __enter__(self) -> Publisher:
        if self._publish is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        self._over.set()
        if self._publish is not None:
            self._thread.join()
            if kind is None:
                self._once()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            if not self._once():
                return

    def _once(self) -> bool:
        assert self._publish is not None
        try:
            self._publish(*self._read())
        except Exception as error:
            if not self._over.is_set():
                logger.warning("weights are published no more: %s", error)
            return False
        return True


def evaluate(model: Any, weights: Weights, dataset: Any) -> dict[str, float]:
    """Scores of a local, compiled `model` with these `weights` on `dataset`.

    Parameters
    ----------
    model : keras.Model
        Of the same architecture as the one that is trained.
    weights : list of ndarray
        In the order of ``model.get_weights()``.
    dataset : tf.data.Dataset
        Batches of ``(x, y)`` or ``(x, y, sample_weight)``.

    Returns
    -------
    dict of str to float
    """
    model.set_weights(weights)
    return {name: float(value) for name, value in model.evaluate(dataset, verbose=0, return_dict=True).items()}


def score(
    model: Any,
    updates: Iterable[tuple[int, Weights]],
    dataset: Any,
    *,
    report: Callable[..., Any] | None = None,
    until: Callable[[dict[str, float]], bool] | None = None,
) -> list[tuple[int, dict[str, float]]]:
    """Evaluate each of `updates` as it comes, until they end or `until` holds.

    Parameters
    ----------
    model, dataset
        See :func:`evaluate`.
    updates : iterable of (int, list of ndarray)
        Steps done so far and weights, as ``fit(publish=)`` gives them; the iterable waits for the next.
    report : callable, optional
        ``report("metrics", step=, values=)`` after each.
    until : callable, optional
        Of the scores; True ends the loop, and whoever called it stops the training.

    Returns
    -------
    list of (int, dict)
        Step and scores of each evaluation.
    """
    scores = []
    for step, weights in updates:
        values = evaluate(model, weights, dataset)
        scores.append((step, values))
        if report is not None:
            report("metrics", step=step, values=values)
        if until is not None and until(values):
            break
    return scores
