"""Devices, GPUs above all: which a worker has, and who may use them now."""

from dask_bridges.devices.found import Device, devices_here
from dask_bridges.devices.leases import Holder, Lease, Leases, leases_here
from dask_bridges.devices.nvml import Usage

__all__ = ["Device", "Holder", "Lease", "Leases", "Usage", "devices_here", "leases_here"]
