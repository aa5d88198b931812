"""Many trainings on few devices: jobs that each have theirs to themselves, in processes of their own."""

from dask_bridges.jobs.events import JobLog, Reported
from dask_bridges.jobs.job import Job
from dask_bridges.jobs.pool import DevicePool
from dask_bridges.jobs.status import PoolStatus

__all__ = ["DevicePool", "Job", "JobLog", "PoolStatus", "Reported"]
