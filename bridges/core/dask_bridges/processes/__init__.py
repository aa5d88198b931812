"""Members whose work is done in a child process of their worker: it can crash, be killed and be taken away alone."""

from dask_bridges.processes.child import ChildMember
from dask_bridges.processes.host import run_in_child

__all__ = ["ChildMember", "run_in_child"]
