"""Moving models: through our serializers, beside pickle and beside one copy of the same bytes.

Keras models with the slots of Adam, and a booster, are serialized and deserialized in one process; the large one also
goes from worker to worker over TCP. Models that are made are freed with the clock stopped.

The large model is bound by memory: its bytes are copied into memory that the process has not touched before. The
small one is bound by Keras, which builds its layers again from their configs; the booster by XGBoost, which reads its
trees.

Run: python benchmarks/models_moving.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import xgboost
from distributed import Client, LocalCluster, wait
from distributed.protocol import deserialize, serialize

from results import show

OURS = "dask_serializers"
COPY, BARE = "memcpy of these bytes, to fresh memory", "Keras alone: rebuild and compile, no values"
ALONE = "of it serialize"


def network(width: int, depth: int) -> Any:
    """A dense network with the slots of Adam."""
    hidden = [keras.layers.Dense(width, activation="relu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(16)])
    model.compile("adam", "mse")
    model.fit(np.zeros((8, width), "float32"), np.zeros((8, 16), "float32"), verbose=0)
    return model


def state(model: Any) -> int:
    """Bytes of weights and slots."""
    variables = (*model.variables, *model.optimizer.variables)
    return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in variables)


def large() -> Any:
    return network(1024, 19)


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, after a turn that is not counted; what it returns is freed with the clock stopped."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            kept = way()
            times[name].append(1e3 * (time.perf_counter() - start))
            del kept
            gc.collect()  # models hold themselves in cycles: none is to pay for the one before
    return {name: taken[1:] for name, taken in times.items()}


def fresh_copy(source: np.ndarray) -> Callable[[], Any]:
    """One copy into memory that the process has not touched before, as any receiver has it."""

    def copy() -> Any:
        import mmap

        memory = mmap.mmap(-1, source.nbytes)
        np.copyto(np.frombuffer(memory, np.uint8), source)
        return memory

    return copy


def in_process(label: str, model: Any, repeats: int) -> None:
    size = state(model)
    config = keras.saving.serialize_keras_object(model)
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: deserialize(*serialize(model)),
        "pickle, protocol 5 (Keras's own)": lambda: pickle.loads(pickle.dumps(model, protocol=5)),
        COPY: fresh_copy(np.ones(size, np.uint8)),
        BARE: lambda: keras_alone(config),
        ALONE: lambda: serialize(model),
    }
    found = in_turns(ways, repeats)
    notes = {OURS: {ALONE: f"{statistics.median(found.pop(ALONE)):.2f} ms"}}
    case = f"{label}, {size / 1e6:.1f} MB with slots, {keras.backend.backend()}"
    show(case, "ms", found, ours=OURS, limits=[COPY, BARE], notes=notes)


def keras_alone(config: Any) -> Any:
    """What any road through Keras's configs pays: random weights, zero slots."""
    from copy import deepcopy

    return keras.saving.deserialize_keras_object(deepcopy(config))


def booster(rounds: int) -> Any:
    random = np.random.default_rng(0)
    matrix = xgboost.QuantileDMatrix(random.normal(size=(60_000, 20)), random.normal(size=60_000))
    return xgboost.train({"max_depth": 13, "eta": 0.05}, matrix, rounds)


def boosters(rounds: int, repeats: int) -> None:
    model = booster(rounds)
    raw = model.save_raw("ubj")

    def by_hand() -> Any:
        new = xgboost.Booster()
        new.load_model(bytearray(model.save_raw("ubj")))
        return new

    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: deserialize(*serialize(model)),
        "save_raw('ubj'), a copy, load_model": by_hand,
        "pickle, protocol 5": lambda: pickle.loads(pickle.dumps(model, protocol=5)),
        COPY: fresh_copy(np.frombuffer(raw, np.uint8)),
    }
    show(f"booster, {len(raw) / 1e6:.0f} MB", "ms", in_turns(ways, repeats), ours=OURS, limits=[COPY])


def peak(reset: bool) -> int:
    """Bytes this process holds (after resetting its peak), or its peak since."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def touched(model: Any) -> int:
    return int(model.count_params())


def between_workers(repeats: int) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        here, there = client.scheduler_info(n_workers=-1)["workers"]
        client.run(lambda: __import__("keras") and None)
        model = client.submit(large, workers=[here])
        size = client.submit(state, model, workers=[here]).result()
        times, pickled, extra = [], [], {here: [], there: []}
        for turn in range(repeats + 1):
            before = client.run(peak, True)
            start = time.perf_counter()
            wait(client.submit(touched, model, workers=[there], pure=False))
            times.append(1e3 * (time.perf_counter() - start))
            after = client.run(peak, False)
            for worker in extra:
                extra[worker].append((after[worker] - before[worker]) / size)
            client.run(forget, model.key, workers=[there])
            start = time.perf_counter()
            sent = client.submit(pickle.dumps, model, 5, workers=[here], key=f"pickled-{turn}")
            wait(client.submit(lambda data: touched(pickle.loads(data)), sent, workers=[there], pure=False))
            pickled.append(1e3 * (time.perf_counter() - start))
    spread = {
        f"peak memory of the {role}, of the model": f"{statistics.median(extra[worker][1:]):.2f}"
        for role, worker in (("sender", here), ("receiver", there))
    }
    found = {OURS: times[1:], "pickled bytes: dumps, transfer, loads": pickled[1:]}
    show("large Keras model from worker to worker, TCP", "ms", found, ours=OURS, notes={OURS: spread})


def forget(key: str, dask_worker: Any) -> None:
    """Drop a worker's copy, so that the next task asks for the model again."""
    dask_worker.handle_stimulus(__import__("distributed").worker_state_machine.RemoveReplicasEvent(
        keys=[key], stimulus_id=f"benchmark-{time.time()}"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=800, help="of the booster")
    options = parser.parse_args()
    in_process("large Keras model", large(), options.repeats)
    in_process("small Keras model", network(64, 2), options.repeats)
    boosters(options.rounds, min(options.repeats, 5))
    between_workers(options.repeats)


if __name__ == "__main__":
    main()
