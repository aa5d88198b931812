"""How the processes of a pool's jobs are set up: what they find imported and set, and who limits their memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from dask_bridges.plugins import installed
from dask_bridges.processes import Environment

__all__ = ["Setup"]


@dataclass(frozen=True)
class Setup:
    """What the processes of a pool's jobs have.

    Attributes
    ----------
    modules : tuple of str
        That are imported ahead.
    variables : mapping of str to str or None
        Environment variables; None for one to be removed.
    limits : mapping of str to str
        Who limits a framework's memory, see `Work`.
    """

    modules: tuple[str, ...]
    variables: Mapping[str, str | None]
    limits: Mapping[str, str]

    @classmethod
    def of(cls, preload: Sequence[str] | None) -> Setup:
        """With these modules imported ahead; by default the frameworks that this process has imported."""
        known = [plugin.children for plugin in installed()[0] if plugin.children is not None]
        here = [module for children in known for module in children.modules if module in sys.modules]
        modules = tuple(dict.fromkeys(here if preload is None else map(str, preload)))
        variables: dict[str, str | None] = {}
        for children in known:
            if children.variables and set(children.modules) & set(modules):
                variables |= resolve_name(children.variables)()
        limits = {children.modules[0]: children.memory for children in known if children.memory}
        return cls(modules, variables, limits)

    def without(self, module: str) -> Setup:
        """The same without one of the modules."""
        return dataclasses.replace(self, modules=tuple(name for name in self.modules if name != module))

    def environment(self, pool: str, env: Mapping[str, str] | None) -> Environment:
        """Of one job; pools share no fork servers, since these end with their pool."""
        variables = {"DASK_BRIDGES_POOL": pool, **self.variables, **(env or {})}
        # What every job's process needs is imported before it is forked, too.
        return Environment(("dask_bridges.jobs.job", *self.modules), tuple(sorted(variables.items())))
