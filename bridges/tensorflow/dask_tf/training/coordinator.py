"""The chief's hold on a TensorFlow cluster: connect, find what was lost, let go."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from dask_bridges.errors import BridgeError, GangTimeout
from dask_tf import upstream
from dask_tf.training.errors import ServerLost, WorkersLost

__all__ = ["Coordinator", "connect", "missing"]

ROLES = ("chief", "worker", "ps")


def missing(spec: Mapping[str, Sequence[str]], *, timeout: float) -> list[str]:
    """Which parameter servers and workers do not accept a connection within `timeout` seconds.

    Returns
    -------
    list of str
        Such as ``["worker:1 at 10.0.0.2:40123"]``; all are asked at once.

    Examples
    --------
    >>> missing({"ps": ["127.0.0.1:1"]}, timeout=0.0)
    ['ps:0 at 127.0.0.1:1']
    """
    asked = [(f"{role}:{n}", at) for role in ("ps", "worker") for n, at in enumerate(spec.get(role, ()))]
    if not asked:
        return []
    deadline = time.monotonic() + timeout
    with ThreadPoolExecutor(len(asked)) as pool:
        there = list(pool.map(lambda each: _answers(each[1], deadline), asked))
    return [f"{name} at {at}" for (name, at), answers in zip(asked, there, strict=True) if not answers]


def _answers(address: str, deadline: float) -> bool:
    host, _, port = address.rpartition(":")
    wait = threading.Event()
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(left, 0.25)).close()
            return True
        except OSError:
            if left <= 0.05:
                return False
            wait.wait(0.05)


def connect(
    spec: Mapping[str, Sequence[str]],
    *,
    timeout: float = 60.0,
    variable_partitioner: Callable[..., Any] | None = None,
) -> Coordinator:
    """Connect this process, as the chief, to the servers of a TensorFlow cluster.

    Connect before any model or variable is made in this process: TensorFlow forgets those made before.

    Parameters
    ----------
    spec : dict of str to list of str
        Role -> addresses, ``"host:port"``. ``ps`` and ``worker`` are needed; with a ``chief`` the servers reach this
        process at that address. Other roles are no part of it.
    timeout : float
        Seconds for all servers to be there, and again for TensorFlow to connect.
    variable_partitioner : callable, optional
        One of ``tf.distribute.experimental.partitioners``, for row-sharded variables in
        :func:`~dask_tf.training.train`. Keras 3 cannot train such variables.

    Returns
    -------
    Coordinator

    Raises
    ------
    BridgeError
        There is no ``ps`` or no ``worker`` in `spec`.
    GangTimeout
        A server is not there; the message names its role and address.

    Examples
    --------
    >>> with connect(spec) as coordinator:  # doctest: +SKIP
    ...     history = fit(coordinator, model, dataset_fn, steps_per_epoch=1000)
    """
    for role in ("ps", "worker"):
        if not spec.get(role):
            raise BridgeError(
                f"training on parameter servers needs at least one {role}; the cluster has {sorted(spec)}"
            )
    absent = missing(spec, timeout=timeout)
    if absent:
        raise GangTimeout(f"not there after {timeout:g} s: {', '.join(absent)}. Look into the logs of these roles")
    strategy = _in_time(lambda: _strategy(spec, variable_partitioner), timeout, spec)
    return Coordinator(spec, strategy, partitioned=variable_partitioner is not None, timeout=timeout)


def _strategy(spec: Mapping[str, Sequence[str]], variable_partitioner: Callable[..., Any] | None) -> Any:
    import tensorflow as tf

    cluster = tf.train.ClusterSpec({role: list(spec[role]) for role in ROLES if spec.get(role)})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster, task_type="chief", task_id=0, rpc_layer="grpc"
    )
    return tf.distribute.ParameterServerStrategy(resolver, variable_partitioner=variable_partitioner)


def _in_time(make: Callable[[], Any], timeout: float, spec: Mapping[str, Sequence[str]]) -> Any:
    """TensorFlow blocks for minutes without a word where a server accepts a connection and says nothing."""
    outcome: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(make())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="dask-tf-connect", daemon=True)
    thread.start()
    thread.join(timeout)
    if raised:
        raise raised[0]
    if not outcome:
        servers = ", ".join(f"{role} {list(spec[role])}" for role in ("ps", "worker"))
        raise GangTimeout(
            f"TensorFlow did not connect within {timeout:g} s, though every port answers: {servers}. "
            "One of them is no TensorFlow server, or is frozen; this process cannot connect again: start the chief anew"
        )
    return outcome[0]


class Coordinator:
    """A connected chief; made by :func:`connect`.

    Attributes
    ----------
    spec : dict of str to list of str
        The cluster.
    strategy : tf.distribute.ParameterServerStrategy
        Variables made in its scope are placed on the servers in turn.
    cluster : tf.distribute.coordinator.ClusterCoordinator
    workers : int
        How many workers there are.
    partitioned : bool
        Whether variables are cut into rows.
    """

    def __init__(
        self, spec: Mapping[str, Sequence[str]], strategy: Any, *, partitioned: bool = False, timeout: float = 60.0
    ) -> None:
        import tensorflow as tf

        self.spec = {role: list(addresses) for role, addresses in spec.items()}
        self.strategy = strategy
        self.cluster = tf.distribute.coordinator.ClusterCoordinator(strategy)
        self.workers = len(self.spec["worker"])
        self.partitioned = partitioned
        self.timeout = timeout
        self._anchors: list[Any] = []
        self._closed = False

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def scope(self) -> AbstractContextManager[Any]:
        """Where variables are made that live on the servers."""
        scope: AbstractContextManager[Any] = self.strategy.scope()
        return scope

    def on_server(self, n: int) -> AbstractContextManager[Any]:
        """Within the scope: where variables are made that live on server `n` (or follow a variable there)."""
        if not self._anchors:
            import tensorflow as tf

            found: dict[str, Any] = {}
            while len(found) < len(self.spec["ps"]):
                anchor = tf.Variable(0, dtype=tf.int64, trainable=False, name="anchor")
                found.setdefault(anchor.device, anchor)
            self._anchors = [found[device] for device in sorted(found, key=_task)]
        return self.beside(self._anchors[n])

    def beside(self, variable: Any) -> AbstractContextManager[Any]:
        """Within the scope: where variables are made that live beside `variable`."""
        place: AbstractContextManager[Any] = self.strategy.extended.colocate_vars_with(variable)
        return place

    def iterate(self, dataset_fn: Callable[[], Any]) -> tuple[Any, Any]:
        """An iterator a worker over `dataset_fn()`, for scheduled functions, and the specs of its elements.

        `dataset_fn` is traced and runs in each worker: it must consist of TensorFlow's own operations.
        """
        dataset = self.cluster.create_per_worker_dataset(dataset_fn)
        return iter(dataset), dataset.element_spec

    def check(self) -> None:
        """Raise what has ended the scheduled functions, if anything has."""
        try:
            self.cluster.done()
        except Exception as error:
            raise self.cause(error) from error

    def cause(self, error: Exception) -> Exception:
        """What `error`, raised by TensorFlow, means: a :class:`ServerLost` where a server is gone, else itself."""
        import tensorflow as tf

        if not isinstance(error, tf.errors.OpError):
            return error
        lost = {f"ps:{n}" for n in upstream.failed_servers(error)} if _connection(error) else set()
        if _connection(error) or upstream.is_lost_state(error):
            lost |= {name.split(" at ")[0] for name in missing({"ps": self.spec["ps"]}, timeout=0.0)}
            if lost or upstream.is_lost_state(error):
                names = tuple(sorted(lost))
                which = " and ".join(names) if names else "a parameter server (restarted meanwhile)"
                return ServerLost(
                    f"lost {which} of {self.spec['ps']} and the variables there. Start it again at its address, "
                    "connect again and go on from the last checkpoint",
                    names,
                )
        return error  # type: ignore[no-any-return]

    def check_workers(self, silent: float) -> None:
        """Raise :class:`WorkersLost` where nothing was heard for long and no worker answers."""
        if silent > self.timeout and len(missing({"worker": self.spec["worker"]}, timeout=0.0)) == self.workers:
            raise WorkersLost(f"no worker has answered for {silent:.0f} s: {self.spec['worker']}. Start them again")

    def close(self) -> None:
        """Disconnect from the servers; do so before they are stopped, or TensorFlow fills the log."""
        if self._closed:
            return
        self._closed = True

        upstream.stop(self.cluster)
        self._anchors.clear()
        del self.cluster
        del self.strategy
        gc.collect()


def _connection(error: Exception) -> bool:
    import tensorflow as tf

    return isinstance(
        error, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.InternalError)
    )


def _task(device: str) -> int:
    import tensorflow as tf

    return int(tf.DeviceSpec.from_string(device).task)
