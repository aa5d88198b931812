"""In the process of a task: TensorFlow is set up, a server started, and then it is there for whoever calls."""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any

from dask_bridges.processes import ChildMember
from dask_tf import here
from dask_tf.roles import RoleWork

__all__ = ["add_feed", "apply", "drop_feed", "serve", "wait_until_up"]

_up = threading.Event()


def serve(member: ChildMember, work: RoleWork) -> None:
    """Be a task of a cluster until it is to stop."""
    stopped = threading.Event()
    member.on_stop(stopped.set)
    here.enter(here.RoleProcess(member, work))
    os.environ["TF_CONFIG"] = work.tf_config
    server = _start_server(work)
    _up.set()
    stopped.wait()
    del server  # until here: its port closes with it
    member.leave()


def _start_server(work: RoleWork) -> Any:
    import tensorflow as tf

    between = max(2, work.threads)  # an operation that waits must leave another a thread
    tf.config.threading.set_intra_op_parallelism_threads(work.threads)
    tf.config.threading.set_inter_op_parallelism_threads(between)
    if not work.serves:
        return None
    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=work.threads, inter_op_parallelism_threads=between)
    task = work.task
    # Alone in its spec: the coordinator brings the whole one.
    spec = tf.train.ClusterSpec({task.role: {task.index: work.addresses[task.role][task.index]}})
    return tf.distribute.Server(spec, job_name=task.role, task_index=task.index, config=config)


def wait_until_up() -> None:
    """Called from the Dask worker: returns once the task can be used."""
    _up.wait()


def apply(call: bytes, inputs: tuple[Any, ...]) -> Any:
    """Called from the Dask worker: a function with results of other tasks as its first arguments."""
    function, args, kwargs = pickle.loads(call)
    return function(*inputs, *args, **kwargs)


def add_feed(name: str, schema: Any) -> None:
    """Called from the Dask worker: something was fed."""
    here.current().feeds[name] = schema


def drop_feed(name: str) -> None:
    """Called from the Dask worker: what was fed is no longer there."""
    here.current().feeds.pop(name, None)
