"""Training on parameter servers, from inside the chief's process; importing this loads no TensorFlow."""

from dask_tf.training.checkpoint import Checkpoints
from dask_tf.training.coordinator import Coordinator, connect, missing
from dask_tf.training.errors import ServerLost, WorkersLost
from dask_tf.training.keras_model import History, fit
from dask_tf.training.loop import Trained, train
from dask_tf.training.scoring import Publisher, evaluate, score

__all__ = [
    "Checkpoints",
    "Coordinator",
    "History",
    "Publisher",
    "ServerLost",
    "Trained",
    "WorkersLost",
    "connect",
    "evaluate",
    "fit",
    "missing",
    "score",
    "train",
]
