"""Members whose work is done in a child process of their worker: it can crash, be killed and be taken away alone."""

from dask_bridges.processes.child import ChildMember
from dask_bridges.processes.forkserver import Environment
from dask_bridges.processes.host import Child, run_in_child

__all__ = ["Child", "ChildMember", "Environment", "run_in_child"]
