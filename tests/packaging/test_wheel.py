"""The wheel has all it needs: installed into an empty environment, it trains."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]

TRAIN = """
import dask.array as da
from distributed import Client, LocalCluster
import dask_bridges, dask_xgboost

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        X = da.arange(400, chunks=100).reshape(-1, 2)
        booster = dask_xgboost.train(client, {"max_depth": 2}, X, X[:, 0], num_boost_round=2)
        values = dask_xgboost.predict(client, booster, X).compute()
    print("trained", booster.num_boosted_rounds(), len(values), dask_bridges.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_what_they_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    for package in ("dask_bridges", "dask_xgboost", "dask_tf", "dask_keras", "dask_serializers"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert "dask_bridges/dask-bridges.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "dask_bridges",
        "dask_keras",
        "dask_serializers",
        "dask_tf",
        "dask_xgboost",
    }
    assert "dask_bridges.ui.cli:bridges" in entry_points
    assert "dask_serializers.hooks:activate" in entry_points


@pytest.mark.slow  # it installs a framework
@pytest.mark.timeout(600)
def test_the_wheel_trains_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[xgboost-cpu]"], check=True)
    script = tmp_path / "script.py"
    script.write_text(TRAIN)
    ran = subprocess.run([python, str(script)], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "trained 2 200" in ran.stdout
    assert str(environment) in ran.stdout
