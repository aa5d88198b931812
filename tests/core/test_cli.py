"""``dask bridges``: what it says when asked for help, and when something is missing."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from dask_bridges import PlacementError, plugins
from dask_bridges.ui import Demo, DemoOptions, Extra, Plugin, cli

MODULE = "a_bridge_of_the_tests"


def greet(client: object, options: DemoOptions) -> None:
    click.echo(f"trained {options.rows} rows for {options.rounds} rounds into {options.output.name}")


def score(client: object, options: DemoOptions) -> dict[str, dict[str, float]]:
    return {"a coin": {"AUC": 0.5}}


def compare(client: object, options: DemoOptions) -> None:
    click.echo(f"after {dict(options.scores)}, {options.epochs} epochs")


def refuse(client: object, options: DemoOptions) -> None:
    raise PlacementError("3 workers wanted, 1 there")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch):
    """Make these the only entry points of our group: name -> the object it leads to."""

    def install(**objects: object) -> None:
        module = ModuleType(MODULE)
        vars(module).update(greet=greet, refuse=refuse, score=score, compare=compare)
        for name, thing in objects.items():
            setattr(module, name, thing)
        monkeypatch.setitem(sys.modules, MODULE, module)
        entries = [EntryPoint(name, f"{MODULE}:{name}", plugins.GROUP) for name in objects]
        monkeypatch.setattr(plugins, "entry_points", lambda group: entries)

    return install


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo whose client is None, so that no process is started."""
    from contextlib import nullcontext

    monkeypatch.setattr(cli, "_cluster", lambda scheduler, workers: nullcontext())
    monkeypatch.setattr(cli, "_describe", lambda client, started: "Cluster: none")


def bridges(*args: str) -> Result:
    return CliRunner().invoke(cli.bridges, args)


def demo(tmp_path: Path, *args: str) -> Result:
    return bridges("demo", "--output", str(tmp_path / "out"), *args)


def test_help_leads_to_the_demo() -> None:
    result = bridges("--help")
    assert result.exit_code == 0
    assert "dask bridges demo" in result.output


def test_demo_help_tells_the_options_and_the_installed_demos(offer) -> None:
    offer(one=Plugin("one", Demo("Trains on one thing.", "nowhere:run")), quiet=Plugin("quiet"))
    result = bridges("demo", "--help")
    assert result.exit_code == 0
    for option in ("--scheduler", "--workers", "--output", "--rows", "--rounds", "--epochs", "--only"):
        assert option in result.output
    assert "Trains on one thing." in result.output
    assert "quiet" not in result.output


def test_the_command_line_loads_neither_a_framework_nor_the_cluster() -> None:
    code = (
        "import sys, dask_bridges.ui.cli; from dask_bridges import plugins; plugins.installed();"
        "print([m for m in ('xgboost', 'pandas', 'dask.dataframe', 'distributed.client') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_demo_passes_the_options_on(offer, no_cluster, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")))
    result = demo(tmp_path, "--rows", "2000", "--rounds", "7")
    assert result.exit_code == 0, result.output
    assert "trained 2000 rows for 7 rounds into out" in result.output
    assert (tmp_path / "out").is_dir()


def test_a_demo_is_given_the_scores_of_those_in_the_places_before(offer, no_cluster, tmp_path: Path) -> None:
    offer(
        alpha=Plugin("alpha", Demo("", f"{MODULE}:compare", place=1)),
        omega=Plugin("omega", Demo("", f"{MODULE}:score")),
    )
    result = demo(tmp_path, "--epochs", "3")
    assert "after {'a coin': {'AUC': 0.5}}, 3 epochs" in result.output
    alone = demo(tmp_path, "--only", "alpha")
    assert "after {}, None epochs" in alone.output


def test_a_demo_that_lacks_a_package_is_left_out(offer, no_cluster, tmp_path: Path) -> None:
    lacks = Demo("", "nowhere:run", (Extra("rare", ("no_such_package",)),), place=1)
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")), two=Plugin("two", lacks))
    result = demo(tmp_path)
    assert result.exit_code == 0, result.output
    assert "The two part of the demo is left out: no_such_package is not installed" in result.output
    assert 'pip install "dask-bridges[rare]"' in result.output
    assert "trained None rows" in result.output


def test_only_a_demo_that_is_there_can_be_chosen(offer, no_cluster, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")))
    result = demo(tmp_path, "--only", "two")
    assert result.exit_code == 2
    assert "--only two: the demos installed are one." in result.output


def test_without_a_demo_it_says_what_to_install(offer, tmp_path: Path) -> None:
    offer(quiet=Plugin("quiet"))
    result = demo(tmp_path)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "pip install" in result.output


def test_a_missing_extra_is_named_in_one_line(offer, tmp_path: Path) -> None:
    extras = (Extra("complete", ("click",)), Extra("first", ("no_such_a", "click")), Extra("second", ("no_such_b",)))
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet", extras)))
    result = demo(tmp_path)
    assert result.exit_code == 1
    assert result.output == (
        'Error: no_such_a, no_such_b are not installed; run: pip install "dask-bridges[first,second]"\n'
    )
    assert not (tmp_path / "out").exists()


def test_a_bad_plugin_is_named_and_the_others_run(offer, no_cluster, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")), text="no plugin")
    offered = plugins.entry_points(group=plugins.GROUP)
    offered.append(EntryPoint("gone", "no_such_bridge:PLUGIN", plugins.GROUP))
    result = demo(tmp_path)
    assert result.exit_code == 0
    assert "Warning: plugin gone (no_such_bridge:PLUGIN) cannot be loaded: No module named" in result.output
    assert "Warning: plugin text" in result.output
    assert "is no dask_bridges Plugin but a str" in result.output
    assert "trained None rows" in result.output


def test_an_error_of_ours_is_told_without_a_traceback(offer, no_cluster, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:refuse")))
    result = demo(tmp_path)
    assert result.exit_code == 1
    *_, message, page = result.output.splitlines()
    assert message == "Error: 3 workers wanted, 1 there"
    assert page.endswith("#placementerror")
    assert isinstance(result.exception, SystemExit)


def test_a_scheduler_that_does_not_answer_is_named(offer, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")))
    result = demo(tmp_path, "--scheduler", "no scheduler")
    assert result.exit_code == 1
    assert result.output.startswith("Error: no scheduler answers at no scheduler")
    del result
    gc.collect()  # the client that was not to be: ended here, and not under a lock of Dask's that it would wait for


def test_workers_and_scheduler_exclude_each_other(tmp_path: Path) -> None:
    result = demo(tmp_path, "--scheduler", "tcp://127.0.0.1:1", "--workers", "2")
    assert result.exit_code == 2
    assert "leave it out with --scheduler" in result.output


def test_an_output_that_cannot_be_made_is_named(offer) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")))
    result = bridges("demo", "--output", "/dev/null/here")
    assert result.exit_code == 1
    assert "cannot write to --output /dev/null/here" in result.output


@pytest.mark.cluster
def test_demo_starts_a_cluster_and_describes_it(offer, tmp_path: Path) -> None:
    offer(one=Plugin("one", Demo("", f"{MODULE}:greet")))
    result = demo(tmp_path, "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "Cluster: 1 worker, " in result.output
    assert "started on this machine" in result.output
