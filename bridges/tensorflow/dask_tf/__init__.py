"""TensorFlow on Dask: a cluster of roles that live in the workers, fed with the partitions they hold."""

from typing import TYPE_CHECKING, Any

from dask_bridges import __version__

if TYPE_CHECKING:
    from dask_tf.cluster import TensorFlowCluster, start_tensorflow
    from dask_tf.feeding import Feed
    from dask_tf.fitting import fit, train
    from dask_tf.here import RoleProcess, current
    from dask_tf.roles import ClusterSpec
    from dask_tf.supervising import Scorer
    from dask_tf.training import History, ServerLost, Trained

__all__ = [
    "ClusterSpec",
    "Feed",
    "History",
    "RoleProcess",
    "Scorer",
    "ServerLost",
    "TensorFlowCluster",
    "Trained",
    "__version__",
    "current",
    "fit",
    "start_tensorflow",
    "train",
]

_HOMES = {
    "ClusterSpec": "roles",
    "Feed": "feeding",
    "History": "training",
    "RoleProcess": "here",
    "Scorer": "supervising",
    "ServerLost": "training",
    "TensorFlowCluster": "cluster",
    "Trained": "training",
    "current": "here",
    "fit": "fitting",
    "start_tensorflow": "cluster",
    "train": "fitting",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: importing the package alone, as finding its plugin does, loads no cluster."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dask_tf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
