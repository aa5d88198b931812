"""``dask bridges …``: Dask's own command line finds the group by entry point.

Dask imports this module whenever ``dask`` is called, so that it imports little:
the cluster and the frameworks come in when a command runs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dask_bridges.errors import BridgeError
from dask_bridges.plugins import Demo, DemoOptions, Plugin, Scores, installed

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["bridges"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="To begin, with real data and on this machine: dask bridges demo",
)
def bridges() -> None:
    """Train machine-learning frameworks on Dask clusters.

    The workers train together, each on the partitions it holds.
    """


class _DemoCommand(click.Command):
    """A command whose help also lists the demos that are installed."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the demos, each with its summary, below the options."""
        rows = [(plugin.name, demo.summary) for plugin, demo in _in_order(installed()[0])]
        if rows:
            with formatter.section("Installed demos"):
                formatter.write_dl(rows)
        super().format_epilog(ctx, formatter)


@bridges.command(
    cls=_DemoCommand,
    short_help="Train on real data, and compare with one process.",
    epilog="A small run for a first look: dask bridges demo --rows 20000 --rounds 20",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Join the cluster of this scheduler, e.g. tcp://10.0.0.1:8786, instead of starting one here. "
    "Its machines need dask-bridges with the same extras as this one.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Worker processes to start here; they share the cores. [default: one a core, 2 to 4]",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    metavar="DIR",
    help="Folder for the model and the plots; made if it is missing, files of an earlier run are replaced.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1000),
    metavar="N",
    help="Use a random sample of about N rows. [default: all]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train at most N boosting rounds. [default: enough for early stopping to end it]",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train Keras models at most N epochs. [default: enough for early stopping to end it]",
)
@click.option(
    "--only",
    metavar="NAME",
    help="Run one of the demos that are installed. [default: all, one after another]",
)
def demo(
    scheduler: str | None,
    workers: int | None,
    output: Path,
    rows: int | None,
    rounds: int | None,
    epochs: int | None,
    only: str | None,
) -> None:
    """Train on real data, on a Dask cluster, and compare with one process.

    Starts worker processes on this machine (or joins a cluster), loads a data
    set that comes with the `demo` extra, trains on the workers with early
    stopping and a live progress bar, predicts on them what was held out, and
    prints how good the predictions are and how long each part took. It needs
    no network, and less than two minutes on two cores.
    """
    if scheduler and workers:
        raise click.UsageError("--workers is for a cluster started here; leave it out with --scheduler.")
    demos = _demos(only)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot write to --output {output}: {error.strerror}") from None
    options = DemoOptions(output, rows, rounds, epochs)
    scores: Scores = {}
    with _cluster(scheduler, workers) as client:
        click.echo(_describe(client, started=scheduler is None))
        for part in demos:
            try:
                scores |= part.load()(client, replace(options, scores=dict(scores))) or {}
            except BridgeError as error:
                raise click.ClickException("\n".join([str(error), *error.__notes__])) from error


@bridges.command(
    short_help="Say what a cluster lacks, and what to do about it.",
    epilog="It imports no framework, and leaves nothing on the cluster. The exit status is 1 where something is wrong.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Look at the cluster of this scheduler, e.g. tcp://10.0.0.1:8786. [default: at this machine alone]",
)
def doctor(scheduler: str | None) -> None:
    """Say what a cluster lacks for training on it, and what to do about that.

    Looks at the versions of what is installed on client, scheduler and
    workers, at devices, memory, ports, and whether workers can connect to each
    other.
    """
    from dask_bridges.ui import doctor as at_work

    if scheduler:
        with _cluster(scheduler, None) as client:
            diagnosis = client.sync(at_work.cluster, client)
    else:
        diagnosis = at_work.this_machine()
    click.echo(at_work.render(diagnosis))
    if diagnosis.problems:
        raise SystemExit(1)


@bridges.command(short_help="Say in a terminal what the report in FILE tells.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def report(file: Path) -> None:
    """Say in a terminal what the report in FILE tells: times, members, losses, last metrics.

    The page itself opens in any browser.
    """
    from dask_bridges.reporting import read
    from dask_bridges.ui.text import story_text

    try:
        click.echo(story_text(read(file)))
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@bridges.command(epilog="One of them again, for its section of the page: dask bridges bench spool")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def bench(names: tuple[str, ...]) -> None:
    """Run the benchmarks of a checkout, each beside its peer, as `make bench` does.

    What they measure is written to docs/benchmarks.md and pictures beside it,
    with date and machine; it takes less than 20 minutes on two cores. With
    names, scripts of the folder benchmarks/, it runs these alone. The exit
    status is not 0 where one fails.

    They are no part of an installed package: install a clone of the repository
    with `pip install -e .`, or call this in one.
    """
    if wrong := [name for name in names if not name.isidentifier()]:
        raise click.UsageError(f"{wrong[0]}: a benchmark is named as its script in benchmarks/, without .py")
    folders = (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents)
    checkout = next((folder for folder in folders if (folder / "benchmarks").is_dir() and _is_ours(folder)), None)
    if checkout is None:
        raise click.ClickException(
            "the benchmarks are in the repository of dask-bridges and not in the package: clone it, and run "
            "`dask bridges bench` or `make bench` there"
        )
    if not shutil.which("make"):
        raise click.ClickException(f"`make` is missing: install it, or see {checkout / 'Makefile'} for what it runs")
    command = ["make", "bench", *([f"ONLY={' '.join(names)}"] if names else [])]
    raise SystemExit(subprocess.run(command, cwd=checkout).returncode)


def _is_ours(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and 'name = "dask-bridges"' in project.read_text()


def _demos(only: str | None) -> list[Demo]:
    """The demos of all plugins, or of one; those that lack a package are left out, with a word on it."""
    plugins, complaints = installed()
    for complaint in complaints:
        click.echo(f"Warning: {complaint}", err=True)
    offered = _in_order(plugins)
    if not offered:
        raise click.ClickException('no bridge with a demo is installed; run: pip install "dask-bridges[all]"')
    chosen = [(plugin, demo) for plugin, demo in offered if only in (None, plugin.name)]
    if not chosen:
        raise click.UsageError(f"--only {only}: the demos installed are {', '.join(p.name for p, _ in offered)}.")
    lacking = {plugin.name: unmet for plugin, demo in chosen if (unmet := demo.unmet())}
    if len(lacking) == len(chosen):
        raise click.ClickException("; ".join(dict.fromkeys(lacking.values())))
    for name, unmet in lacking.items():
        click.echo(f"The {name} part of the demo is left out: {unmet}", err=True)
    return [demo for plugin, demo in chosen if plugin.name not in lacking]


def _in_order(plugins: list[Plugin]) -> list[tuple[Plugin, Demo]]:
    """The plugins that have a part in the demo, in the order in which these run."""
    having = [(plugin, plugin.demo) for plugin in plugins if plugin.demo]
    return sorted(having, key=lambda found: (found[1].place, found[0].name))


@contextmanager
def _cluster(scheduler: str | None, workers: int | None) -> Iterator[Client]:
    """A client of the scheduler at that address, or of a new cluster on this machine."""
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise click.ClickException(f"no scheduler answers at {scheduler}: {error}") from None
        with client:
            yield client
        return
    count = workers or min(max(CPU_COUNT, 2), 4)
    # Port 0: any free one, so that it never meets a cluster that runs already.
    with (
        LocalCluster(
            n_workers=count,
            threads_per_worker=max(CPU_COUNT // count, 1),
            processes=True,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _describe(client: Client, *, started: bool) -> str:
    """One line on the cluster: its size, where it is, and its dashboard."""
    threads = list(client.nthreads().values())
    where = "started on this machine" if started else f"at {client.scheduler_info()['address']}"
    line = f"Cluster: {_count(len(threads), 'worker')}, {_count(sum(threads), 'thread')} in all, {where}"
    if not threads:
        line = f"Cluster: no worker yet, waiting for the first, {where}"
    # Without bokeh the link leads to a page that only says so.
    if client.dashboard_link and (not started or find_spec("bokeh")):
        line += f"; dashboard {client.dashboard_link}"
    return line


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
