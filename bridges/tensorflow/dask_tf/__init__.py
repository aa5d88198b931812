"""TensorFlow on Dask: a cluster of roles that live in the workers, fed with the partitions they hold."""

from dask_bridges import __version__
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
