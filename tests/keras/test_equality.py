"""A model trained on a cluster equals the one that a single process trains on the same batches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

sys.path.insert(0, str(Path(__file__).parent))
import equality
from equality import CASES, LAYOUTS, distributed

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks live in child processes, which need Linux"),
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow"),
]

#: Those that a change is most likely to break; all others are slow.
QUICK = {("dense, adam, l2", 3), ("embedding, lstm", 2)}
#: Those that other backends are tried with; the script trains all.
TABLE = [
    "dense, adam, l2",
    "dense, clipvalue, ema",
    "conv, class weights",
    "embedding, lstm",
    "two inputs, two outputs",
]
EXACT = [name for name, case in CASES.items() if case.exact]
ALL = [
    pytest.param(name, ranks, marks=() if (name, ranks) in QUICK else pytest.mark.slow)
    for name in EXACT
    for ranks in LAYOUTS
]


@pytest.mark.parametrize(("name", "ranks"), ALL)
def test_weights_metrics_and_the_state_of_the_optimizer_equal_those_of_one_process(
    bridges_client: Client, name: str, ranks: int
) -> None:
    found = equality.compare(bridges_client, name, LAYOUTS[ranks])
    assert found["weights"] < 1e-6
    assert found["metrics"] < 1e-6


@pytest.mark.slow  # two frameworks to import in four processes each
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends_give_the_same_table(backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"needs {backend}")
    script = Path(__file__).with_name("equality.py")
    run = subprocess.run(
        [sys.executable, str(script), *TABLE],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    table = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(table) == len(TABLE) * len(LAYOUTS)
    assert [row for row in table if max(row["weights"], row["metrics"]) >= 1e-6] == []


def test_batch_normalization_has_the_moving_means_of_all_rows_on_every_rank(bridges_client: Client) -> None:
    import keras

    import dask_keras

    rng = np.random.default_rng(3)
    X, y = rng.normal(2.0, size=(60, 4)).astype("float32"), rng.normal(size=60).astype("float32")

    def made() -> Any:
        keras.utils.set_random_seed(2)
        layers = [keras.Input((4,)), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        return model

    layout = (20, 20, 20)
    ours, alone = made(), made()
    history = dask_keras.fit(
        bridges_client, ours, distributed(X, layout), distributed(y, layout), batch_size=15, epochs=2, shuffle=False,
        validation_data=(distributed(X, layout), distributed(y, layout)),
    )  # fmt: skip
    alone.fit(X[equality.order(layout, 15)], y, batch_size=15, epochs=2, shuffle=False, verbose=0)
    # Means of equal parts have the mean of all; variances have not.
    np.testing.assert_allclose(ours.layers[0].moving_mean, alone.layers[0].moving_mean, atol=1e-6)
    # What was validated with them is what everybody finds with them afterwards.
    assert history.history["val_loss"][-1] == pytest.approx(ours.evaluate(X, y, verbose=0), abs=1e-6)
