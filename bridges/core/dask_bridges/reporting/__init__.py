"""The report of a run: what its events come to, and the page that shows it."""

from dask_bridges.reporting.recorder import Recorder, asked, read, report, reported, written

__all__ = ["Recorder", "asked", "read", "report", "reported", "written"]
