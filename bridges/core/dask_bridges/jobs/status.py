"""What a pool's devices do now, as a table for people."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from dask_bridges.about import card

__all__ = ["PoolStatus"]

_COLUMNS = ("device", "worker", "state", "holder", "since", "jobs", "utilisation")


class PoolStatus(Sequence[dict[str, Any]]):
    """A row for each device, and how many jobs are not done.

    Attributes
    ----------
    rows : list of dict
        With "device", "worker", "state" ("free", "held", "held elsewhere" or "set aside"), "holder", "since"
        (seconds since the epoch, 0 for nobody), "jobs" that have run there, and "utilisation", the share of the
        pool's time that jobs had the device.
    unfinished : int
        Jobs that run or wait.
    """

    def __init__(self, rows: list[dict[str, Any]], unfinished: int) -> None:
        self.rows = rows
        self.unfinished = unfinished

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return self.rows[at]

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            since = datetime.datetime.fromtimestamp(row["since"]).strftime("%H:%M:%S") if row["since"] else ""
            yield [
                *(str(row[name]) for name in ("device", "worker", "state", "holder")),
                since,
                str(row["jobs"]),
                f"{row['utilisation']:.0%}",
            ]

    def __repr__(self) -> str:
        table = [list(_COLUMNS), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join([f"DevicePool: {len(self)} devices, {self.unfinished} jobs unfinished", *lines])

    def _repr_html_(self) -> str:
        return card(f"DevicePool: {len(self)} devices, {self.unfinished} jobs unfinished", _COLUMNS, self._cells())
