"""The demo from beginning to end, on the client."""

from __future__ import annotations

import textwrap

import click
import numpy as np
from dask.base import compute
from distributed import Client

from dask_bridges.demo import flights, text
from dask_bridges.plugins import DemoOptions, Scores
from dask_xgboost.demo import models, report

__all__ = ["main"]

_QUESTION = """\
Will a flight from New York arrive more than 15 minutes late? XGBoost answers from what is known
before it departs: carrier, origin, destination, schedule, distance, and the weather at the origin in
the hour it is due to leave (as it was observed: it stands in for a forecast)."""


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
        AUC and log-loss of each guess on the test flights.

    Raises
    ------
    PlacementError
        If the workers lack a package.
    """
    clock = text.Stopwatch()
    click.echo(f"\n{_QUESTION}\n")
    with clock("load the flights, on the workers"):
        data = flights.load(client, options.rows)
        summary, rate = _summary(data)
    click.echo(summary)
    with clock("train on the cluster"):
        ours = models.train_on_cluster(client, data, options.rounds)
    click.echo(f"\nTrained {ours.rounds} rounds on the cluster; the best of them is number {ours.best}.")
    with clock("predict on the cluster"):
        late, predicted = models.predict_on_cluster(client, ours, data)
    with clock("fetch the rows for one process"):
        train, valid, test = compute(data.train, data.valid, data.test)
    threads = models.threads_here(client)
    with clock(f"train and predict in one process, {threads} thread{'s' if threads > 1 else ''}"):
        alone, predicted_alone = models.train_here(train, valid, test, options.rounds, threads)
    guesses = {
        f"constant guess, {rate:.1%}": np.full(len(late), rate),
        f"one process, {alone.best} rounds": predicted_alone,
        f"cluster, {ours.best} rounds": predicted.to_numpy(),
    }
    model, picture = options.output / "flights.ubj", options.output / "flights.png"
    ours.booster.save_model(model)
    with clock("plot"):
        report.plot(picture, ours.history, ours.best, late.to_numpy(), guesses)
    scores = report.scores(late.to_numpy(), guesses)
    click.echo(f"\nOn the {len(late):,} test flights:\n{text.scoreboard(scores)}")
    click.echo(f"\nSeconds to\n{clock.report()}")
    click.echo(f"\nWrote {model} (read it with xgboost.Booster(model_file=...))\n      {picture}")
    return scores


def _summary(data: flights.Flights) -> tuple[str, float]:
    """What was loaded, in words, and the share of late flights in the training rows."""
    parts = {
        "train": (data.train, "January to October"),
        "valid": (data.valid, "held out for early stopping: every second week of September and October"),
        "test": (data.test, "November and December"),
    }
    counts = compute(*((part[flights.LABEL].count(), part[flights.LABEL].mean()) for part, _ in parts.values()))
    rows = [("", "flights", "late", "")]
    for (name, (_, what)), (count, late) in zip(parts.items(), counts):
        rows.append((name, f"{count:,}", f"{late:.1%}", what))
    head = (
        f"{data.total:,} flights of 2013 loaded by the workers. {data.dropped:,} of them have no arrival "
        "delay, since they were cancelled or diverted, and are dropped."
    )
    return f"{textwrap.fill(head, 100)}\n{text.table(rows, '<>><')}", float(counts[0][1])
