"""The demo from beginning to end, on the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
from distributed import Client
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import log_loss, roc_auc_score

from dask_bridges.demo import flights, text
from dask_bridges.plugins import DemoOptions, Scores
from dask_keras.demo import quiet

__all__ = ["main"]


def main(client: Client, options: DemoOptions) -> Scores:
    """Load the flights, train, predict, compare; print it all and write the files.

    Parameters
    ----------
    client : distributed.Client
        Client of the cluster that loads, trains and predicts.
    options : DemoOptions

    Returns
    -------
    dict
        AUC and log-loss of the model on the test flights.

    Raises
    ------
    PlacementError
        If the workers lack a package.
    """
    clock = text.Stopwatch()
    click.echo("\nThe same flights through a Keras model: embeddings and dense layers.")
    with clock("load the flights, on the workers"):
        data = flights.load(client, options.rows)
    with clock("import Keras here"):
        quiet.load()
        from dask_keras.demo import network
    with clock("train on the cluster"):
        model, scaling, history = network.train(client, data, options.epochs)
    with clock("import Keras on the workers"):  # training has processes of its own
        quiet.load_on_workers(client)
    with clock("predict on the cluster"):
        late, predicted = network.predict(client, model, scaling, data)
    curves = history.history
    best = int(np.argmax(curves["val_auc"])) + 1
    click.echo(f"Trained {len(history.epoch)} epochs on the cluster; the best of them is number {best}.")
    name = f"Keras, cluster, {best} epoch{'s' if best > 1 else ''}"
    scores = {name: {"AUC": float(roc_auc_score(late, predicted)), "log-loss": float(log_loss(late, predicted))}}
    kept, picture = options.output / "flights.keras", options.output / "flights-keras.png"
    model.save(kept)
    with clock("plot"):
        plot(picture, curves, best)
    click.echo(f"\nOn the {len(late):,} test flights:\n{text.scoreboard({**options.scores, **scores})}")
    click.echo(f"\nSeconds to\n{clock.report()}")
    click.echo(f"\nWrote {kept} (read it with keras.saving.load_model(...))\n      {picture}")
    return scores


def plot(path: Path, curves: Mapping[str, Sequence[float]], best: int) -> None:
    """Draw the learning curves, loss (left) and AUC (right), into a PNG.

    Parameters
    ----------
    path : pathlib.Path
    curves : mapping
        Metrics by name and epoch, those of validation as ``val_...``.
    best : int
        Number of epochs up to the best.
    """
    # A figure with its own canvas: pyplot would look for a display and keep state.
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _curve(left, curves, "loss", "log-loss", best)
    _curve(right, curves, "auc", "AUC", best)
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, curves: Mapping[str, Sequence[float]], metric: str, label: str, best: int) -> None:
    for name, key in (("train", metric), ("valid", f"val_{metric}")):
        axes.plot(np.arange(1, len(curves[key]) + 1), curves[key], marker="o", label=name)
    axes.axvline(best, color="grey", linestyle=":", label=f"best epoch: {best}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Keras on the cluster", xlabel="epoch", ylabel=label)
    axes.legend()
