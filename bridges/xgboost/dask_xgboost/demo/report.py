"""What the demo shows: how good the guesses are, and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from dask_bridges.plugins import Scores

__all__ = ["plot", "scores"]

Guesses = Mapping[str, npt.NDArray[Any]]
"""Predicted probabilities of the test rows, by who predicted them."""


def scores(late: npt.NDArray[Any], guesses: Guesses) -> Scores:
    """AUC and log-loss of each guess."""
    return {
        name: {"AUC": float(roc_auc_score(late, guess)), "log-loss": float(log_loss(late, guess))}
        for name, guess in guesses.items()
    }


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
