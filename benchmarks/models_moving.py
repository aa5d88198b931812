"""Moving models: through our serializers, beside pickle and beside one copy of the same bytes.

Run: python benchmarks/models_moving.py
"""

from __future__ import annotations

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

REPEATS = 9


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


def measure(function: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Milliseconds of each call, after one that is not counted; what it returns is freed with the clock stopped."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        kept = function()
        times.append(1e3 * (time.perf_counter() - start))
        del kept
        gc.collect()  # models hold themselves in cycles: none is to pay for the one before
    return times


def report(label: str, times: list[float], beside: list[float] | None = None) -> None:
    low, middle, high = statistics.quantiles(times, n=4)
    ratio = f"{statistics.median(beside) / middle:8.1f}x" if beside else ""
    print(f"{label:<58}{middle:9.1f}{low:9.1f}{high:9.1f}{ratio}", flush=True)


def fresh_copy(source: np.ndarray) -> Callable[[], Any]:
    """One copy into memory that the process has not touched before, as any receiver has it."""

    def copy() -> Any:
        import mmap

        memory = mmap.mmap(-1, source.nbytes)
        np.copyto(np.frombuffer(memory, np.uint8), source)
        return memory

    return copy


def in_process(label: str, model: Any) -> None:
    size = state(model)
    print(f"\n{label}: {size / 1e6:.1f} MB of weights and slots, {keras.backend.backend()}; serialize and deserialize")
    by_pickle = measure(lambda: pickle.loads(pickle.dumps(model, protocol=5)))
    report("  pickle, protocol 5 (Keras's own)", by_pickle)
    report("  ours", measure(lambda: deserialize(*serialize(model))), by_pickle)
    report("  ours, serialize alone", measure(lambda: serialize(model)))
    report("  memcpy of these bytes, to fresh memory", measure(fresh_copy(np.ones(size, np.uint8))))
    config = keras.saving.serialize_keras_object(model)
    report("  Keras alone: config, rebuild, compile, no values", measure(lambda: keras_alone(config)))


def keras_alone(config: Any) -> Any:
    """What any road through Keras's configs pays: random weights, zero slots."""
    from copy import deepcopy

    return keras.saving.deserialize_keras_object(deepcopy(config))


def booster(rounds: int = 800) -> Any:
    random = np.random.default_rng(0)
    matrix = xgboost.QuantileDMatrix(random.normal(size=(60_000, 20)), random.normal(size=60_000))
    return xgboost.train({"max_depth": 13, "eta": 0.05}, matrix, rounds)


def boosters() -> None:
    model = booster()
    raw = model.save_raw("ubj")
    print(f"\nBooster of {len(raw) / 1e6:.0f} MB; serialize and deserialize")

    def by_hand() -> Any:
        new = xgboost.Booster()
        new.load_model(bytearray(model.save_raw("ubj")))
        return new

    peer = measure(by_hand, 5)
    report("  save_raw('ubj'), a copy, load_model", peer)
    report("  ours", measure(lambda: deserialize(*serialize(model)), 5), peer)
    report("  pickle, protocol 5", measure(lambda: pickle.loads(pickle.dumps(model, protocol=5)), 5), peer)


def peak(reset: bool) -> int:
    """Bytes this process holds (after resetting its peak), or its peak since."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def touched(model: Any) -> int:
    return int(model.count_params())


def between_workers() -> None:
    print("\nThe large model from worker to worker over TCP")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        here, there = client.scheduler_info(n_workers=-1)["workers"]
        client.run(lambda: __import__("keras") and None)
        model = client.submit(large, workers=[here])
        size = client.submit(state, model, workers=[here]).result()
        times, pickled, extra = [], [], {here: [], there: []}
        for turn in range(REPEATS):
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
        report("  pickled bytes: dumps, transfer, loads", pickled[1:])
        report("  ours", times[1:], pickled[1:])
        for label, worker in (("sender", here), ("receiver", there)):
            spread = sorted(extra[worker][1:])
            print(f"  peak memory above what it held, {label}: {statistics.median(spread):.2f} of the state "
                  f"({spread[0]:.2f} to {spread[-1]:.2f})")  # fmt: skip


def forget(key: str, dask_worker: Any) -> None:
    """Drop a worker's copy, so that the next task asks for the model again."""
    dask_worker.handle_stimulus(__import__("distributed").worker_state_machine.RemoveReplicasEvent(
        keys=[key], stimulus_id=f"benchmark-{time.time()}"))  # fmt: skip


def main() -> None:
    print(f"{'milliseconds':<58}{'median':>9}{'q1':>9}{'q3':>9}{'faster':>9}")
    in_process("Large model", large())
    in_process("Small model", network(64, 2))
    boosters()
    between_workers()


if __name__ == "__main__":
    main()
