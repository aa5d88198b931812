"""Jobs on real GPUs: what they see of them, and that they give them back."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from tests.core.jobs_at_work import Flags, hold

from dask_bridges.devices import nvml
from dask_bridges.jobs import DevicePool, Job

pytest.importorskip("pynvml", reason="GPUs are found by nvidia-ml-py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux"),
    pytest.mark.skipif(not nvml.gpus(), reason="NVML knows no GPU here"),
]

TOLERANCE = 100 * 2**20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def gpu_of(name: str) -> nvml.GPU:
    """The GPU that a device's name stands for."""
    return next(gpu for gpu in nvml.gpus() if name == str(gpu.index) or gpu.uuid.startswith(name))


def needs_tensorflow_with_cuda() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    if not tensorflow.test.is_built_with_cuda():
        pytest.skip("TensorFlow is built without CUDA")


def sums_on_tensorflow(before: dict[str, int]) -> tuple[int, str, int]:
    """How many GPUs it sees, where it has worked, and how many bytes more of its GPU are in use than before."""
    import tensorflow as tf

    total = tf.reduce_sum(tf.ones((1000, 1000)))
    gpu = gpu_of(Job.current().devices[0]).uuid
    return len(tf.config.list_physical_devices("GPU")), str(total.device), nvml.usage(gpu).memory - before[gpu]


def test_tensorflow_sees_one_gpu_and_its_memory_is_free_when_the_job_is_over(client: Client) -> None:
    needs_tensorflow_with_cuda()
    before = {gpu.uuid: nvml.usage(gpu.uuid).memory for gpu in nvml.gpus()}
    with DevicePool(client, preload=["tensorflow", "keras"]) as pool:
        count, where, more = pool.submit(sums_on_tensorflow, before).result(timeout=120)
        assert (count, where.rpartition("/")[2]) == (1, "device:GPU:0")
        assert more > TOLERANCE
        assert pool.submit(sums_on_tensorflow, before).result(timeout=120)[0] == 1
    deadline = time.monotonic() + 10
    while left := {gpu: used for gpu in before if (used := nvml.usage(gpu).memory) > before[gpu] + TOLERANCE}:
        assert time.monotonic() < deadline, f"{left} bytes are in use, and {before} were"
        time.sleep(0.05)


def limit_of_tensorflow() -> tuple[int, int]:
    """What TensorFlow may use of its GPU, and all that this has, in bytes."""
    import tensorflow as tf

    (gpu,) = tf.config.list_physical_devices("GPU")
    (device,) = tf.config.get_logical_device_configuration(gpu)
    return device.memory_limit * 2**20, gpu_of(Job.current().devices[0]).memory


def test_tensorflow_keeps_to_the_share_of_its_job(client: Client) -> None:
    needs_tensorflow_with_cuda()
    with DevicePool(client, preload=["tensorflow", "keras"]) as pool:
        limit, whole = pool.submit(limit_of_tensorflow, gpus=0.5).result(timeout=120)
    assert abs(limit - whole / 2) < 2**20


@pytest.mark.skipif(len(nvml.gpus()) < 2, reason="there is one GPU only")
def test_two_jobs_at_once_have_different_gpus(client: Client, tmp_path: Path) -> None:
    flags = Flags(tmp_path)
    with DevicePool(client, preload=()) as pool:
        jobs = [pool.submit(hold, flags, name, "go") for name in ("one", "other")]
        flags.wait("one")
        flags.wait("other")
        flags.set("go")
        one, other = client.gather(jobs)
    assert gpu_of(one).uuid != gpu_of(other).uuid


def boost() -> str:
    import numpy as np
    import xgboost as xgb

    X = np.random.default_rng(0).normal(size=(1000, 4))
    booster = xgb.train({"device": "cuda"}, xgb.QuantileDMatrix(X, X[:, 0]), num_boost_round=2)
    return str(json.loads(booster.save_config())["learner"]["generic_param"]["device"])


def test_xgboost_trains_on_the_gpu_of_its_job(client: Client) -> None:
    xgboost = pytest.importorskip("xgboost")
    if not xgboost.build_info().get("USE_CUDA"):
        pytest.skip("XGBoost is built without CUDA")
    with DevicePool(client, preload=["xgboost"]) as pool:
        assert pool.submit(boost).result(timeout=120) == "cuda:0"


def fit_on_torch() -> tuple[str, str]:
    import keras
    import numpy as np

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((8, 3), "float32"), np.zeros(8, "float32"), verbose=0)
    return keras.backend.backend(), str(model.trainable_variables[0].value.device)


def test_a_forked_child_can_use_cuda_with_keras_on_torch(client: Client) -> None:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs Keras")
    if pytest.importorskip("torch").version.cuda is None:
        pytest.skip("Torch is built without CUDA")
    variables = {"KERAS_BACKEND": "torch", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with DevicePool(client, preload=["torch", "keras"]) as pool:
        futures = [pool.submit(fit_on_torch, env=variables) for _ in range(2)]
        assert client.gather(futures) == [("torch", "cuda:0")] * 2
