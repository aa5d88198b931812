"""``dask bridges doctor``: what a cluster lacks for training on it, and what to do about each.

Every process is asked what it has, in `looks`; what is wrong with that is found in `checks`, and
shown in `tables`.
"""

from dask_bridges.ui.doctor.diagnosis import Diagnosis, Problem, cluster, this_machine
from dask_bridges.ui.doctor.tables import render

__all__ = ["Diagnosis", "Problem", "cluster", "render", "this_machine"]
