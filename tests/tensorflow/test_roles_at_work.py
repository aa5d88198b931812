"""What runs in the processes of tasks: functions, their results and errors, and what people see of it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import pytest

from dask_bridges import MemberLost
from dask_tf import current
from dask_tf.events import RoleUp

pytestmark = pytest.mark.cluster


# What tasks do


def adds(a: int, b: int = 0) -> int:
    return a + b


def pid_of() -> int:
    return os.getpid()


def fails(text: str) -> None:
    raise LookupError(text)


class Unpicklable(Exception):  # noqa: N818
    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.module = sys


def fails_unpicklably() -> None:
    raise Unpicklable


def leaves() -> None:
    raise SystemExit(3)


def view_of(cluster: Any) -> tuple[str, int, dict[str, list[str]], bool]:
    return cluster.role, cluster.index, cluster.tf_spec.as_dict(), cluster is current()


def variables() -> dict[str, str]:
    return dict(os.environ)


def backend() -> str:
    import keras

    return str(keras.config.backend())


def imported() -> bool:
    return {"tensorflow", "keras"} <= set(sys.modules)


def talks(cluster: Any) -> None:
    print("printed")
    os.write(2, b"written\n")
    cluster.log("logged")
    cluster.metrics(3, {"loss": 0.5})


def graph_of() -> float:
    import tensorflow as tf

    return float(tf.function(lambda x: tf.reduce_sum(x * x))(tf.constant([1.0, 2.0])))


# Functions


def test_functions_run_in_the_process_of_each_task_and_results_come_in_order(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    pids = {row["task"]: row["pid"] for row in cluster.status()}
    found = cluster.client.gather(cluster.run("worker", pid_of))
    assert found == [pids["worker:0"], pids["worker:1"]]
    assert cluster.client.gather(cluster.run("worker", adds, 2, b=3)) == [5, 5]
    assert cluster.client.gather(cluster.run("ps", graph_of)) == [5.0]
    assert cluster.client.gather(cluster.run("worker", imported)) == [True, True]


def test_one_task_is_named_by_its_index(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    [found] = cluster.run("worker:1", view_of, cluster)
    assert found.result()[:2] == ("worker", 1)
    with pytest.raises(ValueError, match=r"no task 'worker:2'; there are .*worker:0, worker:1"):
        cluster.run("worker:2", pid_of)
    with pytest.raises(ValueError, match="no task 'baker'"):
        cluster.run("baker", pid_of)


def test_the_cluster_travels_as_each_task_sees_it(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    (role, index, spec, is_current), _ = cluster.client.gather(cluster.run("worker", view_of, cluster))
    assert (role, index, is_current) == ("worker", 0, True)
    assert {role: spec[role] for role in ("ps", "worker")} == cluster.tf_spec.as_dict()


def test_elsewhere_there_is_no_current_task_and_the_cluster_does_not_travel(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    with pytest.raises(RuntimeError, match=r"no task of a TensorFlow cluster.*cluster\.run"):
        current()
    with pytest.raises(Exception) as caught:
        cluster.client.submit(view_of, cluster, pure=False).result()
    assert "travels to its own tasks only" in "".join(traceback.format_exception(caught.value))


def test_exceptions_come_back_whole_and_the_task_goes_on(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    [before] = cluster.client.gather(cluster.run("worker:0", pid_of))
    [failed] = cluster.run("worker:0", fails, "deep")
    with pytest.raises(LookupError, match="deep") as caught:
        failed.result()
    assert "fails" in [entry.name for entry in caught.traceback]
    [failed] = cluster.run("worker:0", fails_unpicklably)
    with pytest.raises(Exception, match="cannot travel"):
        failed.result()
    [failed] = cluster.run("worker:0", leaves)
    with pytest.raises(Exception, match=r"SystemExit\(3\)"):
        failed.result()
    assert cluster.client.gather(cluster.run("worker:0", pid_of)) == [before]


def test_calls_run_side_by_side(tensorflow_cluster: Any) -> None:
    """Each would wait for ever for the other's end."""
    cluster = tensorflow_cluster
    [waits] = cluster.run("worker:0", wait_for_other)
    [sets] = cluster.run("worker:0", set_for_other)
    assert waits.result(30)
    sets.result(30)


def _signal() -> Any:
    import threading

    return vars(sys.modules["builtins"]).setdefault("_signal_of_a_test", threading.Event())


def wait_for_other() -> bool:
    return bool(_signal().wait(30))


def set_for_other() -> None:
    _signal().set()


# What a task finds


def test_tasks_find_their_place_in_the_environment(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    for index, found in enumerate(cluster.client.gather(cluster.run("worker", variables))):
        config = json.loads(found["TF_CONFIG"])
        assert config["task"] == {"type": "worker", "index": index}
        assert config["cluster"]["worker"] == cluster.tf_spec.job_tasks("worker")
        assert config["cluster"]["ps"] == cluster.tf_spec.job_tasks("ps")
        assert found["GREETING"] == "hello"
        assert found["TF_CPP_MIN_LOG_LEVEL"] == "3"


def test_tasks_have_the_client_s_keras_backend(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    keras = sys.modules.get("keras")  # importing it takes seconds
    expected = keras.config.backend() if keras else os.environ.get("KERAS_BACKEND", "tensorflow")
    assert cluster.client.gather(cluster.run("worker:0", backend)) == [expected]


# What people see


def test_what_tasks_write_is_in_the_logs_the_events_and_the_worker_s_log(tensorflow_cluster: Any, watch: Any) -> None:
    cluster = tensorflow_cluster
    cluster.client.gather(cluster.run("worker:1", talks, cluster))
    watch(cluster).until(lambda: all(word in cluster.logs()["worker:1"] for word in ("printed", "written", "logged")))
    assert "printed" not in cluster.logs()["worker:0"]
    assert "printed" in cluster.logs()._repr_html_()
    worker = cluster.dask_spec["worker"][1]
    log = [line for _, line in cluster.client.get_worker_logs(workers=[worker])[worker]]
    assert any(line.endswith("worker:1] written") for line in log)
    heard: list[Any] = []
    cluster.listen(heard.append)  # late, and hears of the past
    assert {event.role for event in heard if isinstance(event, RoleUp)} >= {"ps", "worker"}
    assert any(getattr(event, "values", None) == {"loss": 0.5} for event in heard)


def test_the_status_is_a_table(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    rows = {row["task"]: row for row in cluster.status()}
    assert {row["state"] for row in rows.values()} == {"up"}
    assert rows["ps:0"]["address"] == cluster.tf_spec.task_address("ps", 0)
    assert rows["worker:1"]["worker"] == cluster.dask_spec["worker"][1]
    assert "worker:1 up" in repr(cluster)
    page = cluster._repr_html_()
    assert page.startswith("<table>")
    for row in rows.values():
        assert row["address"] in page


# Restarts


def test_a_task_is_restarted_at_its_address_and_others_go_on(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    before = {row["task"]: row for row in cluster.status()}
    [running] = cluster.run("worker:1", wait_for_other)
    cluster.restart("worker", 1)
    after = {row["task"]: row for row in cluster.status()}
    assert after["worker:1"]["address"] == before["worker:1"]["address"]
    assert after["worker:1"]["pid"] != before["worker:1"]["pid"]
    assert after["worker:1"]["state"] == "up"
    assert {task: row["pid"] for task, row in after.items() if task != "worker:1"} == {
        task: row["pid"] for task, row in before.items() if task != "worker:1"
    }
    with pytest.raises(MemberLost, match=r"worker:1 .*restarted"):
        running.result(30)
    assert cluster.client.gather(cluster.run("worker:1", adds, 1)) == [1]


def test_even_a_parameter_server_may_be_restarted_on_purpose(tensorflow_cluster: Any) -> None:
    cluster = tensorflow_cluster
    address = cluster.tf_spec.task_address("ps", 0)
    cluster.restart("ps", 0)
    assert cluster.tf_spec.task_address("ps", 0) == address
    assert cluster.client.gather(cluster.run("ps", graph_of)) == [5.0]
