"""What people look at: the command line ``dask bridges …`` and what plugs into it."""

from dask_bridges.plugins import Demo, DemoOptions, Extra, Plugin, Scores

__all__ = ["Demo", "DemoOptions", "Extra", "Plugin", "Scores"]
