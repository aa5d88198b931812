"""What cannot be trained on a cluster, or not on this one, is refused early, with the remedy."""

import contextlib
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xgboost as xgb
from distributed import Client, LocalCluster
from distributed.security import Security

import dask_xgboost
from dask_bridges import PlacementError
from dask_bridges.ports import port_range

pytestmark = pytest.mark.cluster


def small() -> tuple[Any, Any]:
    X = da.from_array(np.random.default_rng(0).integers(0, 20, (90, 2)).astype("float32"), chunks=(30, 2))
    return X, (X[:, 0] > X[:, 1]).astype("float32")


def train(client: Client, params: Any = None, **keywords: Any) -> xgb.Booster:
    return dask_xgboost.train(client, params or {}, *small(), num_boost_round=2, **keywords)


# Parameters


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"booster": "gblinear"}, r"booster='gblinear' cannot be trained on a cluster: .* use gbtree or dart"),
        ({"tree_method": "exact"}, r"tree_method='exact' cannot be trained on a cluster: .* use hist"),
        ({"tree_method": "approx"}, r"tree_method='approx' .* use hist"),
        ({"objective": "survival:cox"}, r"objective='survival:cox' .* use survival:aft"),
        ({"updater": "grow_colmaker,prune"}, r"updater='grow_colmaker' .* leave updater out"),
        ([("booster", "gblinear"), ("eta", 1)], r"booster='gblinear'"),
        ({"process_type": "update", "updater": "refresh"}, r"updater='refresh' .* Use xgboost.train on one machine"),
        ({"process_type": "update", "updater": "prune"}, r"process_type='update' on 3 workers: .* Use n_workers=1"),
    ],
)
def test_what_needs_all_rows_in_one_process_is_refused(bridges_client: Client, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(bridges_client, params)


@pytest.mark.parametrize(
    "params", [{"objective": "reg:absoluteerror"}, {"objective": "reg:quantileerror", "quantile_alpha": 0.5}]
)
def test_leaves_that_are_fitted_rank_by_rank_are_warned_of(bridges_client: Client, params: Any) -> None:
    with pytest.warns(UserWarning, match=rf"{params['objective']} on 3 workers: .* train on one worker"):
        train(bridges_client, params)
    one = sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(bridges_client, params, workers=one)


def test_callbacks_of_another_kind_are_refused(bridges_client: Client) -> None:
    with pytest.raises(TypeError, match=r"callbacks are xgboost.callback.TrainingCallback objects"):
        train(bridges_client, callbacks=[print])


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(TypeError, match="the first argument is the Dask client"):
        dask_xgboost.train({}, *small())


# Workers


@contextlib.contextmanager
def cluster_with(tmp_path: Path, preload: str) -> Iterator[Client]:
    """A cluster whose worker has run `preload` before anything else."""
    script = tmp_path / "preload.py"
    script.write_text(preload)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", preload=[str(script)]) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("preload", "message"),
    [
        (
            "import sys; sys.modules['xgboost'] = None",
            r"worker tcp://\S+ cannot import xgboost \(ModuleNotFoundError.*\). Install it there, for \S+python",
        ),
        (
            "import xgboost; xgboost.__version__ = '1.7.6'",
            rf"xgboost is 1.7.6 on worker tcp://\S+ and {xgb.__version__} on the client: install the same version",
        ),
    ],
    ids=["missing", "another version"],
)
def test_a_worker_without_the_clients_xgboost_is_named(tmp_path: Path, preload: str, message: str) -> None:
    with cluster_with(tmp_path, preload) as client, pytest.raises(PlacementError, match=message):
        train(client)


# The tracker


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def test_a_tracker_port_that_is_busy_is_named(bridges_client: Client, busy_port: int) -> None:
    message = (
        rf"tracker could not listen on 127\.0\.0\.1, port {busy_port}: .*in use. Set tracker_host and tracker_port"
    )
    with pytest.raises(PlacementError, match=message):
        train(bridges_client, tracker_port=busy_port)


def test_the_next_port_of_a_range_is_taken(bridges_client: Client, busy_port: int) -> None:
    found = train(bridges_client, tracker_port=(busy_port, busy_port + 20), tracker_host="127.0.0.1")
    assert found.num_boosted_rounds() == 2


def test_host_and_port_of_the_tracker_may_be_configured(bridges_client: Client, busy_port: int) -> None:
    with (
        dask.config.set({"dask-bridges.xgboost.tracker-port": busy_port}),
        pytest.raises(PlacementError, match=f"port {busy_port}"),
    ):
        train(bridges_client)
    with (
        dask.config.set({"dask-bridges.xgboost.tracker-host": "no.such.host.invalid"}),
        pytest.raises(PlacementError, match=r"could not listen on no\.such\.host\.invalid, any port"),
    ):
        train(bridges_client)


@pytest.mark.parametrize("port", ["http", "9010:9000", -1, 70_000, (5, 4), "1:2:3"])
def test_a_port_that_is_none_is_refused(bridges_client: Client, port: Any) -> None:
    with pytest.raises(ValueError, match=r'pass a port, or a range such as "9000:9010"'):
        train(bridges_client, tracker_port=port)


@pytest.mark.parametrize(
    ("port", "wanted"),
    [(9000, [9000]), ("9000", [9000]), ("9000:9002", [9000, 9001, 9002]), ((7, 8), [7, 8]), (0, [0])],
)
def test_a_port_is_a_number_or_a_range(port: Any, wanted: list[int]) -> None:
    assert list(port_range(port)) == wanted


# Clusters under TLS


@pytest.fixture
def security(tmp_path: Path) -> Security:
    """Self-signed, for the time of the test."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=dask"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    files = {f"tls_{role}_{kind}": path for role in ("scheduler", "worker", "client")
             for kind, path in (("key", key), ("cert", certificate))}  # fmt: skip
    return Security(require_encryption=True, tls_ca_file=certificate, **files)


@pytest.mark.slow
def test_a_cluster_under_tls_asks_for_consent_to_plain_tcp(security: Security) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", security=security) as cluster,
        Client(cluster, security=security) as client,
    ):
        with pytest.raises(PlacementError, match=r"tls://.* is protected by TLS.* pass allow_plaintext=True"):
            train(client)
        assert train(client, allow_plaintext=True).num_boosted_rounds() == 2
        with dask.config.set({"dask-bridges.allow-plaintext": True}):
            assert train(client).num_boosted_rounds() == 2
