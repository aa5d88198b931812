"""Progress bars: listeners of a gang's events, drawn by tqdm in terminals and notebooks."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from dask_bridges import config
from dask_bridges.events import Event, Log, Metrics, Progress

__all__ = ["ProgressBar", "wants_bar"]


def wants_bar(progress: bool | None) -> bool:
    """Whether to draw: as told, by argument or configuration, else where a person looks on."""
    told = config.get("progress", progress)
    return _someone_looks() if told is None else bool(told)


def _someone_looks() -> bool:
    """A terminal, or a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" or (sys.stderr is not None and sys.stderr.isatty())


def _size() -> dict[str, Any]:
    """How large to draw: some terminals report no size at all, and tqdm would draw nothing."""
    with contextlib.suppress(AttributeError, OSError):  # no terminal, or a console that is no file
        if not os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


class ProgressBar:
    """One bar for one gang: rounds, rate and the newest metrics.

    Parameters
    ----------
    label : str
        Shown in front.

    Examples
    --------
    >>> bar = ProgressBar("XGBoost")
    >>> gang.events.listen(bar)     # doctest: +SKIP
    >>> bar.close()
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        """Draw what the event tells."""
        if isinstance(event, Progress):
            self._advance(event)
        elif isinstance(event, Metrics) and self._bar is not None:
            newest = {name: f"{value:.5g}" for name, value in event.values.items()}
            self._bar.set_postfix(newest, refresh=False)
        elif isinstance(event, Log) and event.rank < 0:
            from tqdm.auto import tqdm

            tqdm.write(f"{self.label} {event.text}", file=sys.stderr)

    def _advance(self, event: Progress) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=event.total or None, desc=self.label, unit=event.unit, **_size())
        self._bar.update(event.done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
