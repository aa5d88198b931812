"""What registering does, and does not, in one process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("keras")


def run(code: str) -> list[str]:
    """What a new process prints; lines."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


MOVES = """
def moves(model):
    import types
    from distributed.protocol import deserialize, pickle, serialize
    if b"dask_serializers" not in pickle.dumps(types.SimpleNamespace(held=model)):
        return False
    header, frames = serialize(model)
    return header["serializer"] == "dask" and deserialize(header, frames).count_params() == model.count_params()
"""
MODEL = "import keras; model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])"


@pytest.mark.parametrize(
    "order",
    [
        "import keras; import distributed",
        pytest.param("import distributed; import keras", marks=pytest.mark.slow),
        # distributed's own hook has fired, and has looked up a model's type
        pytest.param(
            """
import keras, distributed.protocol
from dask_serializers import hooks
hooks.deactivate()
distributed.protocol.serialize(keras.Sequential())
hooks.activate()
""",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_installed_package_needs_no_call_whatever_is_imported_first(order: str) -> None:
    assert run(f"{MOVES}\n{order.strip()}\n{MODEL}\nprint(moves(model))") == ["True"]


@pytest.mark.slow
def test_an_object_that_holds_a_model_moves_where_a_model_has_arrived_before_keras_was_imported() -> None:
    code = f"""
import distributed, dask_serializers.keras
{MODEL}
print(b"arrive_nested" in distributed.protocol.pickle.dumps([model]))
"""
    assert run(code) == ["True"]


def test_registering_imports_no_framework() -> None:
    code = """
    import sys
    from distributed import Client, LocalCluster
    import dask_serializers
    with LocalCluster(processes=False, n_workers=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        dask_serializers.register(client)
        dask_serializers.register(client)
    print(*{"keras", "tensorflow", "xgboost", "jax", "torch"} & set(sys.modules))
    """
    assert run(code) == []


@pytest.mark.slow  # TensorFlow is imported once more
def test_tensorflow_is_as_untouched_as_after_its_own_import() -> None:
    code = """
    import distributed, keras, tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(1)  # refused once the first tensor is made
    print(tf.config.threading.get_intra_op_parallelism_threads())
    """
    assert run(code) == ["1"]


@pytest.mark.slow  # TensorFlow is imported once more
def test_a_version_we_do_not_know_still_imports() -> None:
    code = """
    import sys, types
    from dask_serializers import hooks
    import distributed
    sys.modules["dask_serializers.keras"] = unknown = types.ModuleType("unknown")
    unknown.teach = None  # fails where it is called
    import keras
    print(keras.Sequential.__name__)
    """
    assert run(code) == ["Sequential"]


@pytest.mark.slow  # TensorFlow is imported once more
def test_it_can_be_undone() -> None:
    code = f"""
{MOVES}
{MODEL}
import dask.sizeof
from distributed import Client, LocalCluster
import dask_serializers, pickle
with LocalCluster(processes=False, n_workers=1, dashboard_address=":0") as cluster, Client(cluster) as client:
    dask_serializers.register(client)
    print(moves(model), dask.sizeof.sizeof(model) > 1000)
    dask_serializers.unregister(client)
    from distributed.protocol import serialize
    print(serialize(model)[0]["serializer"], dask.sizeof.sizeof(model) > 1000)
    dask_serializers.register(client)
    print(moves(model))
"""
    assert run(code) == ["True", "True", "error", "False", "True"]


@pytest.mark.slow  # TensorFlow is imported once more
def test_distributeds_own_serializer_still_fails_on_keras_3() -> None:
    """When this fails, upstream has mended it: see whether ours is needed for more than completeness and speed."""
    code = f"""
{MODEL}
from dask_serializers import hooks
hooks.deactivate()
from distributed.protocol import serialize
header, frames = serialize(model)
print(header["serializer"], "_updated_config" in bytes(frames[1]).decode())
"""
    assert run(code) == ["error", "True"]


@pytest.mark.slow  # TensorFlow is imported once more
def test_a_users_own_pickle_and_copy_are_as_ever() -> None:
    code = f"""
{MODEL}
import copy, distributed, pickle, pickletools
blob = pickle.dumps(model)
print(b"dask_serializers" in blob, type(pickle.loads(blob)).__name__, type(copy.deepcopy(model)).__name__)
"""
    assert run(code) == ["False", "Sequential", "Sequential"]


def test_a_reader_of_another_protocol_says_which_versions_have_met() -> None:
    from dask_serializers import CannotMove
    from dask_serializers.parcel import Parcel, arrive_nested, pack

    header, frames = pack(Parcel("keras", {}, versions={"keras": "9.9"}))
    header["protocol"] = 99
    with pytest.raises(CannotMove, match=r"protocol 99 \(dask-bridges [\d.]+, keras 9.9\).*reads protocol 1"):
        arrive_nested(header, *frames).layers  # noqa: B018


@pytest.mark.slow  # processes that import TensorFlow
@pytest.mark.parametrize("missing", ["keras", "backend"])
def test_a_model_without_its_framework_says_so(missing: str) -> None:
    code = f"""
import os, pickle, subprocess, sys
{MODEL}
from distributed.protocol import serialize
header, frames = serialize(model)
reader = '''
import pickle, sys
from distributed.protocol import deserialize
if {missing == "keras"}:
    sys.modules["keras"] = None
try:
    deserialize(*pickle.load(sys.stdin.buffer))
except Exception as error:
    print(type(error).__name__, error)
'''
sent = pickle.dumps((header, [bytes(frame) for frame in frames]))
environment = dict(os.environ, KERAS_BACKEND="nonesuch")
done = subprocess.run([sys.executable, "-c", reader], input=sent, capture_output=True, env=environment)
print(done.stdout.decode(), done.stderr.decode()[-500:])
"""
    said = run(code)
    assert said[0] == "CannotMove"
    assert ("nonesuch" if missing == "backend" else "keras") in " ".join(said)
