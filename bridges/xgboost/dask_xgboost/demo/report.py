"""What the demo shows: tables of text, and one picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

__all__ = ["Stopwatch", "plot", "scores", "table"]

Guesses = Mapping[str, npt.NDArray[Any]]
"""Predicted probabilities of the test rows, by who predicted them."""


class Stopwatch:
    """Seconds by part, in the order they were taken.

    >>> from dask_xgboost.demo.report import Stopwatch
    >>> clock = Stopwatch()
    >>> with clock("nothing"):
    ...     pass
    >>> list(clock.seconds)
    ['nothing']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start

    def report(self) -> str:
        """The seconds, a line each, and their sum."""
        rows = [(part, f"{seconds:.1f}") for part, seconds in self.seconds.items()]
        return table([*rows, ("in all", f"{sum(self.seconds.values()):.1f}")], "<>")


def table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Lay `rows` out in columns, each aligned as its character of `align` (``<`` or ``>``) says.

    >>> from dask_xgboost.demo.report import table
    >>> print(table([("a", "1"), ("long", "10")], "<>"))
      a      1
      long  10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths)).rstrip()
        for row in rows
    )


def scores(late: npt.NDArray[Any], guesses: Guesses) -> str:
    """AUC and log-loss of each guess, a line each."""
    rows = [("", "AUC", "log-loss")]
    for name, guess in guesses.items():
        rows.append((name, f"{roc_auc_score(late, guess):.4f}", f"{log_loss(late, guess):.4f}"))
    return table(rows, "<>>")


def plot(
    path: Path,
    history: Mapping[str, Mapping[str, Sequence[float]]],
    best: int,
    late: npt.NDArray[Any],
    guesses: Guesses,
) -> None:
    """Draw the learning curves (left) and the ROC curves (right) into a PNG.

    Parameters
    ----------
    path : pathlib.Path
    history : mapping
        Metrics by evaluation set, metric and round.
    best : int
        Number of rounds up to the best.
    late : array of shape (n,)
        The truth, 0 or 1.
    guesses : mapping
        Probabilities of shape (n,) by name.
    """
    # A figure with its own canvas: pyplot would look for a display and keep state.
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _learning_curves(left, history, best)
    _roc_curves(right, late, guesses)
    figure.savefig(path, dpi=120)


def _learning_curves(axes: Axes, history: Mapping[str, Mapping[str, Sequence[float]]], best: int) -> None:
    for name, metrics in history.items():
        losses = metrics["logloss"]
        axes.plot(np.arange(1, len(losses) + 1), losses, label=name)
    axes.axvline(best, color="grey", linestyle=":", label=f"best round: {best}")
    axes.set(title="Training on the cluster", xlabel="boosting round", ylabel="log-loss")
    axes.legend()


def _roc_curves(axes: Axes, late: npt.NDArray[Any], guesses: Guesses) -> None:
    for (name, guess), style in zip(guesses.items(), (":", "--", "-")):
        false_alarms, hits, _ = roc_curve(late, guess)
        axes.plot(false_alarms, hits, style, label=f"{name} (AUC {roc_auc_score(late, guess):.3f})")
    axes.set(title="Flights of November and December", xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right")
