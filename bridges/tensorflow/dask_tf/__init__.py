"""TensorFlow on Dask: a cluster of roles that live in the workers, fed with the partitions they hold."""

from dask_bridges import __version__
from dask_tf.cluster import TensorFlowCluster, start_tensorflow
from dask_tf.here import RoleProcess, current
from dask_tf.roles import ClusterSpec

__all__ = ["ClusterSpec", "RoleProcess", "TensorFlowCluster", "__version__", "current", "start_tensorflow"]
