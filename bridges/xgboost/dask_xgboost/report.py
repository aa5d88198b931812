"""What `train` prints for ``verbose_eval``: XGBoost's own lines, here on the client."""

from __future__ import annotations

from tqdm.auto import tqdm

from dask_bridges.events import Event, Metrics

__all__ = ["RoundPrinter"]


class RoundPrinter:
    """A listener that prints metrics as `xgboost.train` does, every `period` rounds and the last."""

    def __init__(self, period: bool | int) -> None:
        self.period = int(period)
        self._held: str | None = None
        self._next = 0

    def __call__(self, event: Event) -> None:
        """Print the line of a round, or hold it back in case it is the last."""
        if not isinstance(event, Metrics) or event.step < self._next:  # a round that is done again
            return
        self._next = event.step + 1
        values = "\t".join(f"{name}:{value:.5f}" for name, value in event.values.items())
        line = f"[{event.step}]\t{values}"
        if event.step % self.period == 0:
            tqdm.write(line)
            self._held = None
        else:
            self._held = line

    def close(self) -> None:
        """Print the last line, if it was held back."""
        if self._held is not None:
            tqdm.write(self._held)
