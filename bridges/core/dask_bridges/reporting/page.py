"""A story as one HTML page that needs nothing else: figures by Bokeh, the rest plain."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dask.utils import format_bytes

from dask_bridges.about import card
from dask_bridges.reporting.cells import CALLED, attempt_cells, failures, member_cells, overcome
from dask_bridges.reporting.figures import COLORS, figures
from dask_bridges.reporting.shares import Shares
from dask_bridges.reporting.story import Run, Story

__all__ = ["page"]

_PLURALS = {
    "member": "members",
    "device": "devices",
    "job": "jobs",
    "run": "runs",
    "restart": "restarts",
    "round": "rounds",
    "epoch": "epochs",
    "batch": "batches",
    "step": "steps",
}

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 0 auto; max-width: 1180px;
       padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.when { color: #616e7c; margin: 0 0 1rem; }
.failed, .mended { background: #fdecea; border-left: 4px solid #b3261e; padding: .6rem .9rem; white-space: pre-wrap;
                   overflow-wrap: anywhere; }
.mended { background: #fff4e0; border-color: #e69f00; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1rem 0; }
.tiles div { display: flex; flex-direction: column; } .tiles b { font-size: 1.5rem; line-height: 1.2; }
.tiles span { color: #616e7c; font-size: .85rem; }
.bar { display: flex; height: 22px; gap: 1px; background: #fff; } .bar i { display: block; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: .4rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; } caption { text-align: left; font-weight: 600; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
td { font-variant-numeric: tabular-nums; max-width: 60ch; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 3rem; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; }
pre { font-size: .8rem; white-space: pre-wrap; }
"""


def page(plain: Mapping[str, Any], data: str) -> str:
    """The page of a story.

    Parameters
    ----------
    plain : mapping
        A story, by `Story.plain`.
    data : str
        An element that holds it, for `reporting.read`.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources

    story = Story.from_plain(plain)
    shares = Shares.of(story)
    drawn = figures(story, shares)
    scripts, places = components({name: figure for chart in drawn for name, figure in chart.figures.items()})
    charts = []
    for chart in drawn:
        inside = "".join(f"<div>{places[name]}</div>" for name in chart.figures)
        wide = "" if len(chart.figures) == 1 else ' class="charts"'
        charts.append(f"<h2>{html.escape(chart.title)}</h2>{_note(chart.note)}<div{wide}>{inside}</div>")
    title = ", ".join(dict.fromkeys(run.label for run in story.runs)) or "dask-bridges"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.began))
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style>{Resources(mode='inline', components=['bokeh']).render()}</head><body>",
        f"<h1>{html.escape(title)}</h1><p class='when'>{when}, report of dask-bridges</p>",
        _failure(story),
        _tiles(story, shares),
        _bar(shares),
        *charts,
        *(_tables(run) for run in story.runs),
        data,
        scripts,
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _note(text: str) -> str:
    return f"<p class='when'>{html.escape(text)}</p>" if text else ""


def _failure(story: Story) -> str:
    """What went wrong, and where."""
    boxes = (
        ("failed", "It failed." if story.error else "One of them failed.", failures(story)),
        ("mended", "It went on after:", overcome(story)),
    )
    return "".join(
        f"<div class='{kind}'><b>{head}</b>\n{html.escape(chr(10).join(texts))}</div>"
        for kind, head, texts in boxes
        if texts
    )


def _tiles(story: Story, shares: Shares) -> str:
    rows = [row for run in story.runs for row in run.rows.values()]
    devices = [row for row in rows if row.device]
    pools = {"devices": sum(bool(row.workers) for row in devices)} if devices else {}
    fed = sum(row.rows for row in rows)
    peak = max((held for row in rows for _, held in row.memory), default=0)
    restarts = sum(len({attempt.number for attempt in run.attempts}) - 1 for run in story.runs)
    done: dict[str, int] = {}
    for unit, count in (each for run in story.runs for each in run.done.items()):
        units = _PLURALS.get(unit, unit)
        done[units] = done.get(units, 0) + count
    tiles = {
        "in all": f"{story.ended - story.began:.1f} s",
        "of the time nobody computed": f"{shares.nobody:.0%}",
        **_counted(
            {"members": len(rows) - len(devices), **pools, "runs": len(story.runs), "restarts": restarts, **done}
        ),
    }
    if fed:
        tiles["rows fed"] = f"{fed:,}"
    if peak:
        tiles["most memory of a worker"] = format_bytes(peak)
    body = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles.items()
    )
    return f"<div class='tiles'>{body}</div>"


def _counted(counts: Mapping[str, int]) -> dict[str, str]:
    """Numbers of things, by what one calls so many of them.

    >>> _counted({"runs": 1, "batches": 1, "members": 3000})
    {'run': '1', 'batch': '1', 'members': '3,000'}
    """
    single = {units: unit for unit, units in _PLURALS.items()}
    return {single.get(units, units) if count == 1 else units: f"{count:,}" for units, count in counts.items()}


def _bar(shares: Shares) -> str:
    """What the time went into, at each moment the most useful that any member did."""
    found = {CALLED[kind]: (share, COLORS[kind]) for kind, share in shares.totals.items()}
    found["preparing data, or between"] = max(0.0, 1.0 - sum(share for share, _ in found.values())), "#e4e7eb"
    there = {name: (share, color) for name, (share, color) in found.items() if share >= 0.0005}
    bar = "".join(
        f"<i style='background:{color};width:{share:.3%}' title='{name}: {share:.1%}'></i>"
        for name, (share, color) in there.items()
    )
    legend = "".join(
        f"<span><i style='background:{color}'></i>{name} {share:.1%}</span>" for name, (share, color) in there.items()
    )
    return f"<h2>What the time went into</h2><div class='bar'>{bar}</div><div class='legend'>{legend}</div>"


def _tables(run: Run) -> str:
    head, *members = member_cells(run)
    side = [
        card("Parameters", ["name", "value"], run.params.items()),
        card("Versions", ["package", "version"], run.versions.items()),
        card("Attempts", *_split(attempt_cells(run))),
    ]
    log = f"<pre>{html.escape(chr(10).join(run.log))}</pre>" if run.log else ""
    return f"<h2>{html.escape(run.label)}</h2>{_wide(card('Members', head, members))}{_side(side)}{log}"


def _split(cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return cells[0], cells[1:]


def _wide(table: str) -> str:
    return f"<div class='wide'>{table}</div>"


def _side(tables: Iterable[str] | Sequence[str]) -> str:
    return f"<div class='tables'>{''.join(tables)}</div>"
