"""Models between the processes of a real cluster."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from distributed.worker import get_worker

import dask_serializers

pytestmark = pytest.mark.cluster
pytest.importorskip("keras")
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _things_are_importable() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(HERE))
    patch.setenv("PYTHONPATH", str(HERE))
    patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def client(_things_are_importable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two worker processes, and the client in a third; nobody has said a word about serializers."""
    folder = str(tmp_path_factory.mktemp("spill"))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", local_directory=folder) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def workers(client: Client) -> list[str]:
    return list(client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def things(_things_are_importable: None) -> Any:
    import things

    return things


def test_a_model_built_on_a_worker_arrives_at_the_client(client: Client, things: Any) -> None:
    built = client.submit(things.build)
    there = client.submit(things.outputs, built).result(60)
    assert things.outputs(built.result(60)) == there


def test_a_model_goes_from_worker_to_worker(client: Client, workers: list[str], things: Any) -> None:
    built = client.submit(things.build, seed=1, workers=workers[:1])
    here, there = (client.submit(things.outputs, built, workers=[each], pure=False) for each in workers)
    assert here.result(60) == there.result(60)


@pytest.mark.parametrize("direct", [True, False])
def test_a_scattered_model_is_the_one_that_was_sent(client: Client, things: Any, direct: bool) -> None:
    model = things.build(seed=2)
    sent = client.scatter(model, broadcast=True, direct=direct)
    assert client.submit(things.outputs, sent).result(60) == things.outputs(model)


def test_a_model_is_an_argument_of_a_task(client: Client, things: Any) -> None:
    model = things.build(seed=3)
    assert client.submit(things.outputs, model).result(60) == things.outputs(model)


@pytest.mark.parametrize("box", [lambda m: [1, m], lambda m: {"m": m}, lambda m: (m, m), lambda m: {"a": [{"b": m}]}])
def test_a_model_is_inside_a_collection(client: Client, things: Any, box: Any) -> None:
    model = things.build(seed=4)
    back = client.submit(lambda box: box, box(model), pure=False).result(60)
    found = back
    while isinstance(found, (list, tuple, dict)):
        found = next(iter(found.values())) if isinstance(found, dict) else found[-1]
    assert things.outputs(found) == things.outputs(model)


def test_a_model_is_inside_an_object_that_knows_nothing_of_us(client: Client, workers: list[str], things: Any) -> None:
    built = client.submit(things.build, seed=5, workers=workers[:1])
    held = client.submit(things.Holder, "held", built, workers=workers[:1])
    there = client.submit(things.held_outputs, held, workers=workers[1:]).result(60)
    assert there == client.submit(things.outputs, built).result(60)
    assert things.held_outputs(held.result(60)) == there


def test_training_goes_on_at_another_worker_as_if_it_had_stayed(
    client: Client, workers: list[str], things: Any
) -> None:
    def trained(model: Any, epochs: int) -> Any:
        import keras
        import numpy as np

        keras.utils.set_random_seed(1)
        x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
        model.fit(x, x.sum(1, keepdims=True), epochs=epochs, batch_size=8, shuffle=False, verbose=0)
        return model

    start = client.submit(things.build, seed=6, workers=workers[:1])
    stayed = client.submit(trained, things.build(seed=6), 6, workers=workers[:1])
    first = client.submit(trained, start, 3, workers=workers[:1])
    moved = client.submit(trained, first, 3, workers=workers[1:])
    assert things.outputs(moved.result(60)) == things.outputs(stayed.result(60))


def test_a_model_of_classes_and_functions_defined_here_arrives_with_them(client: Client, workers: list[str]) -> None:
    import keras

    class Doubled(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return 2 * x

    offset = 3.0

    def loss(y: Any, p: Any) -> Any:
        return keras.ops.mean((y - p) ** 2) + offset

    inputs = keras.Input((4,))
    lambdas = [keras.layers.Lambda(lambda x: x + offset), keras.layers.Lambda(lambda x: x * offset)]
    model = keras.Sequential([inputs, Doubled(), *lambdas, keras.layers.Dense(1, activation=lambda x: x - offset)])
    model.compile("sgd", loss, metrics=[lambda y, p: keras.ops.sum(p)])

    def scores(model: Any) -> Any:
        import numpy as np

        x = np.arange(8, dtype="float32").reshape(2, 4)
        return model.evaluate(x, x[:, :1], verbose=0), model.predict(x, verbose=0).tolist()

    sent = client.scatter(model, workers=workers[:1])
    assert client.submit(scores, sent, workers=workers[1:]).result(60) == scores(model)
    assert scores(client.submit(lambda m: m, sent, workers=workers[1:]).result(60)) == scores(model)


@pytest.mark.slow
def test_a_model_of_a_script_moves_both_ways(tmp_path: Path, client: Client) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys, keras, numpy as np
        from distributed import Client

        @keras.saving.register_keras_serializable(package="script")
        class Net(keras.Model):
            def __init__(self, units, **kwargs):
                super().__init__(**kwargs)
                self.units, self.dense = units, keras.layers.Dense(units)
            def call(self, x):
                return self.dense(x)
            def get_config(self):
                return {"units": self.units}

        def trained(model):
            model.fit(np.ones((4, 2), "float32"), np.ones((4, 3), "float32"), verbose=0)
            return model

        if __name__ == "__main__":
            with Client(sys.argv[1]) as client:
                net = Net(3)
                net.compile("adam", "mse")
                back = client.submit(trained, net).result(timeout=60)
                print(type(back) is Net, back.units, int(back.optimizer.iterations.numpy()))
        """)
    )
    command = [sys.executable, str(script), client.scheduler.address]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["True", "3", "1"], run.stderr[-3000:]


def test_a_model_comes_back_from_disk_as_it_went(client: Client, workers: list[str], things: Any) -> None:
    built = client.submit(things.build, seed=8, workers=workers[:1])
    before = client.submit(things.outputs, built, workers=workers[:1]).result(60)

    def spill(key: str) -> list[bool]:
        worker = get_worker()
        worker.data.fast.evict()  # the least recently used: everything, one after the other
        while key in worker.data.fast:
            worker.data.fast.evict()
        return [key in worker.data.fast, key in worker.data.slow]

    assert client.submit(spill, built.key, workers=workers[:1], pure=False).result(60) == [False, True]
    assert client.submit(things.outputs, built, workers=workers[:1], pure=False).result(60) == before


@pytest.mark.slow
def test_the_scheduler_needs_nothing_for_what_it_relays(things: Any) -> None:
    from dask_bridges.testing.clusters import command_line_cluster

    with command_line_cluster(workers=2, bare_scheduler=True) as cluster:
        client = cluster.client
        dask_serializers.register(client)
        model = things.build(seed=9)
        first, second = client.scheduler_info(n_workers=-1)["workers"]
        sent = client.scatter(model, workers=[first], direct=False)
        assert client.submit(things.outputs, sent, workers=[second]).result(60) == things.outputs(model)
        assert things.outputs(client.gather(sent, direct=False)) == things.outputs(model)


def test_what_cannot_leave_its_worker_raises_at_the_next_and_at_the_client(
    client: Client, workers: list[str], things: Any
) -> None:
    built = client.submit(things.with_lock, workers=workers[:1], pure=False)
    used = client.submit(lambda model: model.count_params(), built, workers=workers[1:])
    for future in (used, built):
        with pytest.raises(dask_serializers.CannotMove, match=r"guarded \(.*things.py, line \d+\).*closure"):
            future.result(60)
    nested = client.submit(things.Holder, "held", built, workers=workers[:1])
    with pytest.raises(dask_serializers.CannotMove, match="guarded"):
        nested.result(60).model.layers  # noqa: B018


def test_what_a_worker_cannot_rebuild_raises_there_and_passes_through(
    client: Client, workers: list[str], tmp_path: Path, things: Any
) -> None:
    module = tmp_path / "only_here.py"
    module.write_text(
        textwrap.dedent("""
        import keras

        @keras.saving.register_keras_serializable(package="only_here")
        class Tripled(keras.layers.Layer):
            def call(self, x):
                return 3 * x

        class Net(keras.Model):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.dense = keras.layers.Dense(1)
            def call(self, x):
                return self.dense(x)
        """)
    )

    def make(folder: str, name: str) -> Any:
        import sys

        import keras
        import numpy as np

        sys.path.insert(0, folder)
        import only_here

        sys.path.remove(folder)
        if name == "Net":
            model = only_here.Net()
            model(np.ones((1, 4), "float32"))
            return model
        return keras.Sequential([keras.Input((4,)), only_here.Tripled(), keras.layers.Dense(1)])

    for name in ("Tripled", "Net"):
        made = client.submit(make, str(tmp_path), name, workers=workers[:1])
        used = client.submit(lambda model: model.count_params(), made, workers=workers[1:])
        with pytest.raises(dask_serializers.CannotMove, match=r"module only_here.*upload_file"):
            used.result(60)
        passed = client.submit(lambda model: {"inside": model}, made, workers=workers[1:])
        back = client.submit(lambda box: box["inside"].count_params(), passed, workers=workers[:1])
        assert back.result(60) == 5


def test_a_client_without_pickle_gets_plain_models_and_is_told_why_not_others(client: Client, things: Any) -> None:
    import keras

    def custom() -> Any:
        return keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x)])

    with Client(client.scheduler.address, serializers=["dask", "msgpack"], set_as_default=False) as strict:
        assert things.outputs(strict.submit(things.build, seed=10).result(60)) == things.outputs(things.build(seed=10))
        with pytest.raises(dask_serializers.CannotMove, match=r"<lambda>.*only pickle.*register_keras_serializable"):
            strict.submit(custom).result(60)


@pytest.mark.slow
def test_workers_that_join_later_move_models_too(client: Client, workers: list[str], things: Any) -> None:
    dask_serializers.register(client)
    client.cluster.scale(3)
    client.wait_for_workers(3, timeout=60)
    (late,) = set(client.scheduler_info(n_workers=-1)["workers"]) - set(workers)
    built = client.submit(things.build, seed=11, workers=[late])
    held = client.submit(things.Holder, "held", built, workers=workers[:1])
    assert client.submit(things.held_outputs, held, workers=[late]).result(60) == things.outputs(built.result(60))
