"""What ``dask_tf`` adds to the core; loading it imports no framework."""

from __future__ import annotations

from dask_bridges.plugins import Checkup, Children, Plugin

__all__ = ["PLUGIN"]

PLUGIN = Plugin(
    name="tensorflow",
    children=Children(("tensorflow",), variables="dask_tf.starting:variables", memory="dask_tf.memory:limit"),
    checkup=Checkup(("tensorflow",), "tensorflow"),
)
