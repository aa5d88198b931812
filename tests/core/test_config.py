"""Configuration: our defaults, the user's values, the argument of a call."""

from __future__ import annotations

import subprocess
import sys

import dask.config
import pytest

from dask_bridges import config


def test_the_argument_wins_over_the_configuration_and_that_over_the_default() -> None:
    assert config.get("allow-plaintext") is False
    with dask.config.set({"dask-bridges.allow-plaintext": True}):
        assert config.get("allow-plaintext") is True
        assert config.get("allow-plaintext", False) is False


@pytest.mark.parametrize(("given", "wanted"), [("500ms", 0.5), (2, 2.0), ("2 minutes", 120.0), (None, 300.0)])
def test_durations_are_seconds_or_text(given: str | float | None, wanted: float) -> None:
    assert config.seconds("timeout", given) == wanted


def test_every_default_can_be_read() -> None:
    durations = {key: config.seconds(key) for key in ("timeout", "start-timeout", "stop-timeout", "wait-notice")}
    assert durations == {"timeout": 300, "start-timeout": 300, "stop-timeout": 30, "wait-notice": 2}
    assert config.get("progress") is None
    assert config.get("balance-tolerance") == 0.1


def test_the_environment_of_the_user_wins_over_our_defaults() -> None:
    code = "import dask_bridges; from dask_bridges import config; print(config.seconds('timeout'))"
    environment = {"DASK_DASK_BRIDGES__TIMEOUT": "7 s", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "7.0"
