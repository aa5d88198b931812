"""The examples in docstrings, README and docs run as they stand."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import dask_bridges
import dask_keras
import dask_serializers
import dask_tf
import dask_xgboost

ROOT = Path(__file__).parents[2]


def _modules() -> list[Any]:
    found: list[Any] = [
        info.name
        for package in (dask_bridges, dask_keras, dask_serializers, dask_tf, dask_xgboost)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    # They import all of Keras, or start TensorFlow.
    for name in ("dask_serializers.registration", "dask_tf.cluster", "dask_tf.fitting"):
        found[found.index(name)] = pytest.param(name, marks=pytest.mark.slow)
    return ["dask_bridges", "dask_keras", "dask_serializers", "dask_tf", "dask_xgboost", *found]


def _block(page: str, containing: str) -> str:
    """The Python example of a page that contains a string."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return next(block for block in blocks if containing in block)


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("name", _modules())
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_the_readmes_example_trains(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "flights"
    folder.mkdir()
    for part in range(3):
        table = pd.DataFrame({"distance": rng.random(300), "hour": rng.integers(0, 24, 300)})
        table.assign(late=(table["hour"] > 17).astype("int8")).to_parquet(folder / f"{part}.parquet")
    monkeypatch.chdir(tmp_path)
    code = _block("README.md", "dask_xgboost.train").replace("Client() ", "current ")
    names: dict[str, Any] = {"current": client}
    exec(code, names)
    assert ((names["late"].compute() > 0.5) == (names["df"]["late"].compute() == 1)).all()


def test_the_metrics_in_the_docs_are_of_all_rows(client: Client) -> None:
    names: dict[str, Any] = {"__name__": "__main__", "dask_xgboost": dask_xgboost, "np": np, "client": client}
    exec(_block("docs/xgboost.md", "def precision("), names)
    X = da.random.default_rng(0).integers(0, 9, (200, 2), chunks=(50, 2)).persist()
    y = (X[:, 0] > X[:, 1]).astype("float32").persist()
    names.update(X=X, y=y, X_valid=X, y_valid=y, params={"objective": "binary:logistic", "eval_metric": "auc"})
    for metric in ("precision", "median_error"):
        history: dict[str, Any] = {}
        dask_xgboost.train(
            client, names["params"], X, y, num_boost_round=3, evals=[(X, "e")], evals_result=history,
            custom_metric=names[metric],
        )  # fmt: skip
        assert history["e"][metric.removesuffix("_error")][-1] == pytest.approx(float(metric == "precision"), abs=0.35)
    exec(_block("docs/xgboost.md", "def listen("), names)
    assert len(names["curve"]) == 10


@pytest.mark.cluster
@pytest.mark.slow
def test_the_first_training_of_the_docs_runs_as_a_script(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text(_block("docs/start.md", "dask_xgboost.train"))
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = re.search(r"log-loss (0\.\d+), (\d+\.\d)% wrong", ran.stdout)
    assert said, ran.stdout
    assert float(said[2]) < 5
