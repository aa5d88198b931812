"""``dask bridges doctor`` on real clusters, on each of which something is wrong, or nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import dask
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster
from tests.core.test_placement import client_of, paused

from dask_bridges.testing import command_line_cluster
from dask_bridges.testing.clusters import cluster_of_hosts
from dask_bridges.testing.hosts import missing_for_networks, network
from dask_bridges.testing.packages import another_version, package_missing
from dask_bridges.ui import cli, doctor
from dask_bridges.ui.doctor import checks, surroundings


def told(client: Client) -> list[doctor.Problem]:
    """What is found of a cluster, but for what the machine of the tests is to blame for."""
    found = client.sync(doctor.cluster, client).problems
    return [problem for problem in found if "/dev/shm" not in problem.what and "NVIDIA" not in problem.what]


def only(client: Client) -> doctor.Problem:
    (problem,) = told(client)
    return problem


@pytest.fixture
def worker(bridges_client: Client) -> str:
    """The address of one worker of three."""
    return sorted(bridges_client.scheduler_info(n_workers=-1)["workers"])[1]


# A sound cluster


@pytest.mark.cluster
def test_of_a_sound_cluster_it_shows_all_and_finds_nothing(bridges_client: Client) -> None:
    diagnosis = bridges_client.sync(doctor.cluster, bridges_client)
    assert told(bridges_client) == []
    text = doctor.render(diagnosis)
    assert bridges_client.scheduler.address in text
    for worker in bridges_client.scheduler_info(n_workers=-1)["workers"]:
        assert worker in text
    assert diagnosis.calls == 6  # each of three calls both others
    assert dask.__version__ in text
    assert diagnosis.installed["scheduler"]["packages"]["dask"]["version"] == dask.__version__
    versions = {repr(look["packages"]) for look in diagnosis.installed.values()}
    assert len(versions) == 1


@pytest.mark.cluster
def test_it_leaves_nothing_on_the_workers(bridges_client: Client) -> None:
    told(bridges_client)
    assert set(bridges_client.run(lambda: len(surroundings._doors)).values()) == {0}


@pytest.mark.cluster
@pytest.mark.slow
def test_the_scheduler_needs_nothing_of_ours() -> None:
    with command_line_cluster(workers=1, nanny=False, bare_scheduler=True) as cluster:
        diagnosis = cluster.client.sync(doctor.cluster, cluster.client)
        assert "version" not in diagnosis.installed["scheduler"]["packages"]["dask_bridges"]
        assert told(cluster.client) == []


# The command


@pytest.mark.cluster
@pytest.mark.slow
def test_the_exit_status_tells_whether_something_is_wrong(bridges_client: Client, worker: str) -> None:
    sound = bool(bridges_client.sync(doctor.cluster, bridges_client).problems)
    arguments = ["doctor", "--scheduler", bridges_client.scheduler.address]
    result = CliRunner().invoke(cli.bridges, arguments)
    assert result.exit_code == int(sound), result.output
    with another_version(bridges_client, worker, "numpy", "1.0"):
        result = CliRunner().invoke(cli.bridges, arguments)
    assert result.exit_code == 1
    assert f"numpy is 1.0 on worker {worker}" in result.output


def test_without_a_scheduler_it_looks_at_this_machine_and_imports_no_framework() -> None:
    code = (
        "import sys; from dask_bridges.ui import doctor; print(doctor.render(doctor.this_machine()));"
        "print('loaded', sorted({'xgboost', 'tensorflow', 'keras', 'torch', 'jax', 'pandas'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("This machine")
    assert f"python        {sys.version.split()[0]}" in run.stdout
    assert "loaded []" in run.stdout


# What is installed


@pytest.mark.cluster
def test_another_version_on_one_worker_is_told_with_both_and_what_to_do(bridges_client: Client, worker: str) -> None:
    with another_version(bridges_client, worker, "xgboost", "0.9"):
        found = only(bridges_client)
    assert found.where == f"worker {worker}"
    assert found.what.startswith(f"xgboost is 0.9 on worker {worker} and ")
    assert found.remedy == "Install the same version in both places"


@pytest.mark.cluster
def test_a_framework_that_one_worker_lacks_is_told_with_the_extra(bridges_client: Client, worker: str) -> None:
    with package_missing(bridges_client, worker, "tensorflow"):
        found = only(bridges_client)
    assert found.what.startswith(f"worker {worker} cannot import tensorflow (ModuleNotFoundError")
    assert found.remedy == f'Install it there, for {sys.executable}: pip install "dask-bridges[tensorflow]"'


@pytest.mark.cluster
def test_what_workers_need_not_have_may_be_missing(bridges_client: Client, worker: str) -> None:
    with package_missing(bridges_client, worker, "jax"):
        assert told(bridges_client) == []


@pytest.mark.cluster
@pytest.mark.slow
def test_a_worker_without_this_package_is_told_and_the_others_are_looked_at() -> None:
    with command_line_cluster(workers=2, nanny=False, bare_workers=1) as cluster:
        diagnosis = cluster.client.sync(doctor.cluster, cluster.client)
        found = told(cluster.client)
    (bare,) = {worker.address for worker in diagnosis.workers} - diagnosis.around.keys()
    assert found[0].what.startswith(f"worker {bare} cannot import dask_bridges (ModuleNotFoundError")
    lacking = {problem.what.split(" (")[0] for problem in found}
    assert f"worker {bare} cannot import xgboost" in lacking
    assert all(problem.where == f"worker {bare}" for problem in found)
    assert diagnosis.calls == 2
    assert diagnosis.installed[bare]["packages"]["dask"]["version"] == dask.__version__


@pytest.mark.cluster
def test_keras_backends_that_differ_are_told(bridges_client: Client, worker: str) -> None:
    def set_backend(value: str | None) -> str | None:
        before = os.environ.pop("KERAS_BACKEND", None)
        if value is not None:
            os.environ["KERAS_BACKEND"] = value
        return before

    before = bridges_client.run(set_backend, "another", workers=[worker])[worker]
    try:
        found = only(bridges_client)
    finally:
        bridges_client.run(set_backend, before, workers=[worker])
    assert found.where == f"worker {worker}"
    assert found.what.startswith("KERAS_BACKEND is another there and ")


@pytest.mark.cluster
def test_a_python_of_another_minor_version_is_told_and_nothing_is_sent_there(
    bridges_client: Client, worker: str
) -> None:
    def pretend(release: str | None) -> None:
        from distributed import versions

        real = getattr(versions, "real_system_info", versions.get_system_info)
        vars(versions)["real_system_info"] = real
        vars(versions)["get_system_info"] = lambda: {**real(), "python": release} if release else real()

    bridges_client.run(pretend, "3.9.1.final.0", workers=[worker])
    try:
        diagnosis = bridges_client.sync(doctor.cluster, bridges_client)
        found = only(bridges_client)
    finally:
        bridges_client.run(pretend, None, workers=[worker])
    assert found.where == f"worker {worker}"
    assert found.what.startswith(f"Python is 3.9.1 there and {sys.version.split()[0]} on the client")
    assert found.remedy == "Use the same minor version in all places"
    assert worker not in diagnosis.around
    assert "3.9.1" in doctor.render(diagnosis)


# Workers, ports, memory


def test_paused_workers_are_told_with_their_memory(
    client: Client, threads_cluster: LocalCluster, addresses: list[str]
) -> None:
    with paused(threads_cluster, addresses[0]):
        found = only(client)
    assert found.where == f"worker {addresses[0]}"
    assert found.what.startswith("paused (")
    assert "free what they hold" in found.remedy


def test_a_cluster_without_workers_is_told() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        assert only(client).what == "the cluster has no workers"


@pytest.mark.parametrize(
    ("blocked", "told_what"),
    [
        ("register_scheduler_plugin", "will refuse the one that gives trainings their turns"),
        ("run_function", "so its versions are not known"),
    ],
)
def test_a_scheduler_that_refuses_calls_is_told(blocked: str, told_what: str) -> None:
    with (
        dask.config.set({"distributed.scheduler.blocked-handlers": [blocked]}),
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        found = only(client)
    assert told_what in found.what
    assert f"Take {blocked} out of its Dask configuration" in found.remedy


@pytest.mark.cluster
def test_a_port_that_is_taken_is_told_by_its_setting(bridges_client: Client) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with dask.config.set({"dask-bridges.xgboost.tracker-port": port}):
            found = only(bridges_client)
    assert found.what == f"0 of port {port} of dask-bridges.xgboost.tracker-port are free, and 1 wanted"
    assert "or 0 for any free port" in found.remedy


def test_a_range_needs_a_port_for_each_worker_of_a_host() -> None:
    seen = surroundings.Surroundings([], False, 2**30, 2**30, {"collective-port": 2, "tracker": 2})
    wanted = {"collective-port": range(9000, 9003), "tracker": range(9000, 9003)}
    (found,) = checks.ports({"10.0.0.1": seen}, wanted, {"10.0.0.1": ["a", "b", "c"]}, "collective-port")
    assert found.where == "host 10.0.0.1"
    assert found.what.startswith("2 of the 3 ports 9000 to 9002 of dask-bridges.collective-port are free, and 3 wanted")


def test_it_says_how_many_of_the_ports_configured_are_free() -> None:
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        with dask.config.set({"dask-bridges.collective-port": port}):
            assert f"dask-bridges.collective-port: {port}; free: 0 here" in doctor.render(doctor.this_machine())
    assert "ports: any that are free, since no setting names one" in doctor.render(doctor.this_machine())


def test_a_setting_that_is_no_port_is_told() -> None:
    with dask.config.set({"dask-bridges.collective-port": "many"}):
        found = [problem.what for problem in doctor.this_machine().problems]
    assert any("dask-bridges.collective-port='many'" in what for what in found)


def test_a_small_memory_for_spools_is_told() -> None:
    small = surroundings.Surroundings([], False, 60 * 2**20, 64 * 2**20, {})
    (found,) = checks.spool_memory({"tcp://a": small}, {"tcp://a": 8 * 2**30})
    assert found.where == "worker tcp://a"
    assert "/dev/shm has 60.00 MiB to spare of 64.00 MiB" in found.what
    assert checks.spool_memory({"tcp://a": small}, {"tcp://a": 200 * 2**20}) == []  # more than it could use


def test_gpus_that_are_not_seen_are_told() -> None:
    blind = surroundings.Surroundings([], True, 2**30, 2**30, {})
    (found,) = checks.drivers({"tcp://a": blind})
    assert 'pip install "dask-bridges[gpu]"' in found.remedy


def test_what_tls_does_not_cover_is_told() -> None:
    (found,) = checks.traffic(client_of("tls://10.0.0.1:8786"))
    assert "what the frameworks send is plain TCP between the workers" in found.what
    assert "allow_plaintext=True" in found.remedy
    with dask.config.set({"dask-bridges.allow-plaintext": True}):
        assert checks.traffic(client_of("tls://10.0.0.1:8786")) == []


# Between workers

FIREWALLED = """
import sys, dask
from distributed import Client
from dask_bridges.ui import doctor
dask.config.set({"dask-bridges.collective-port": "9000:9010"})
with Client(sys.argv[1], timeout=60) as client:
    client.wait_for_workers(2)
    print(doctor.render(client.sync(doctor.cluster, client)))
"""


@pytest.mark.cluster
@pytest.mark.skipif(bool(missing_for_networks()), reason=missing_for_networks())
@pytest.mark.slow
def test_a_firewall_between_workers_is_told_with_both_ends() -> None:
    with network("one", "two") as hosts, cluster_of_hosts(hosts, "one", ["one", "two"]) as address:
        hosts.forbid("two", "9000-9010")
        command = hosts.on("one", [sys.executable, "-c", FIREWALLED, address])
        text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    two, one = hosts.address("two"), hosts.address("one")
    assert f"worker tcp://{two}:" in text
    assert f"does not reach worker tcp://{one}:" in text
    assert f"({one}:9000: " in text
    assert f"does not reach worker tcp://{two}:" not in text
    assert "a range to which dask-bridges.collective-port" in text


@pytest.mark.cluster
def test_who_answers_in_place_of_a_worker_is_told(bridges_client: Client, worker: str) -> None:
    async def another(reader: object, writer: object) -> None:
        writer.write(b"something else entirely, and longer than a greeting is")  # type: ignore[attr-defined]
        writer.close()  # type: ignore[attr-defined]

    async def knocked() -> dict[str, str]:
        server = await asyncio.start_server(another, "127.0.0.1", 0)
        door = server.sockets[0].getsockname()[:2]
        async with server:
            calls = {worker: {"tcp://another": door}}
            answers = await bridges_client.run(surroundings.knock, "token", calls, workers=[worker])
        return dict(answers[worker])

    assert bridges_client.sync(knocked)["tcp://another"].startswith("another machine or program answers at 127.0.0.1:")


# Benchmarks


def test_the_benchmarks_of_a_checkout_are_run_from_anywhere_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "dask-bridges"\n')
    (tmp_path / "Makefile").write_text("bench:\n\techo measured $(ONLY) > result\n\tfalse\n")
    monkeypatch.chdir(tmp_path / "benchmarks")
    result = CliRunner().invoke(cli.bridges, ["bench"])
    assert result.exit_code == 2  # make's own, for a target that fails
    assert (tmp_path / "result").read_text() == "measured\n"
    assert CliRunner().invoke(cli.bridges, ["bench", "glm", "spool"]).exit_code == 2
    assert (tmp_path / "result").read_text() == "measured glm spool\n"
    assert "without .py" in CliRunner().invoke(cli.bridges, ["bench", "glm.py"]).output


def test_without_a_checkout_it_says_where_the_benchmarks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "cli.py"))
    result = CliRunner().invoke(cli.bridges, ["bench"])
    assert result.exit_code == 1
    assert "clone it" in result.output
