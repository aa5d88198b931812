"""The figures of a report, by Bokeh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_bridges.reporting.cells import CALLED
from dask_bridges.reporting.shares import KINDS, Shares
from dask_bridges.reporting.story import Row, Run, Story

__all__ = ["COLORS", "Chart", "figures"]

#: Told apart by people who see few colours, too (Okabe and Ito 2008).
COLORS = {
    "compute": "#009e73",
    "build": "#0072b2",
    "communicate": "#e69f00",
    "receive": "#56b4e9",
    "checkpoint": "#cc79a7",
    "restart": "#d55e00",
    "start": "#f0e442",
    "wait": "#c3c9d0",
}
#: Of lines, one after another.
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7b8794", "#a6a13a")
MARKS = {"lost": ("x", "#b3261e"), "failed": ("x", "#b3261e"), "restarted": ("triangle", "#1f2933")}

WIDTH, HALF = 1120, 540
#: Slices of time in which rates are told, and lines of a chart.
RATES, MOST = 120, 40
#: Most figures of curves of a run.
METRICS = 12
#: Slices in which it is told how many compute: a divisor of `shares.MOMENTS`.
COARSE = 300


@dataclass
class Chart:
    """Figures under one title."""

    title: str
    figures: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class _Named:
    """A row, as it is called among those of all runs."""

    name: str
    row: Row
    run: Run


def figures(story: Story, shares: Shares) -> list[Chart]:
    """What there is to show of a story."""
    rows = list(_rows(story))
    timeline = _timeline(story, rows)
    computing = _computing(story, shares, timeline.x_range)
    note = (
        "Where a moment is shared, so is the height of the bar. Crosses: lost or failed; triangles: there again. "
        "The clocks of the hosts are taken as they are."
    )
    computing.min_border_left = timeline.min_border_left = 50 + 7 * max((len(each.name) for each in rows), default=0)
    who = "Devices" if any(each.row.device for each in rows) else "Members"
    charts = [Chart("Timeline", {"timeline": timeline}, note), Chart(f"{who} that compute", {"computing": computing})]
    if curves := dict(_curves(story)):
        charts.append(Chart("Learning curves", curves))
    if fed := dict(_fed(story, rows, timeline.x_range)):
        charts.append(Chart("Fed to the framework", fed))
    if any(each.row.memory for each in rows):
        memory = _memory(story, rows, timeline.x_range)
        memory.min_border_left = timeline.min_border_left
        charts.append(Chart("Memory of each worker", {"memory": memory}))
    if placed := dict(_placed(story)):
        charts.append(Chart("Where the partitions lay", placed, "In the last attempt; a box is a partition."))
    for chart in charts:
        for name, figure in chart.figures.items():
            figure.name = name
    return charts


def _rows(story: Story) -> Iterator[_Named]:
    for number, run in enumerate(story.runs):
        for name, row in run.rows.items():
            if row.pieces or row.marks or row.memory:
                several = len(story.runs) > 1
                yield _Named(f"{number + 1} {run.label}: {name}" if several else name, row, run)


def _figure(**options: Any) -> Any:
    from bokeh.plotting import figure

    made = figure(**{"width": HALF, "height": 260, "tools": "xpan,xwheel_zoom,box_zoom,reset,save", **options})
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.outline_line_color = None
    made.grid.grid_line_color = "#edf0f2"
    for axis in made.axis:
        axis.axis_line_color = axis.major_tick_line_color = "#9aa5b1"
        axis.minor_tick_line_color = None
        axis.major_label_text_color = axis.axis_label_text_color = "#52606d"
        axis.axis_label_text_font_style = "normal"
    return made


def _timeline(story: Story, rows: Sequence[_Named]) -> Any:
    from bokeh.models import ColumnDataSource, CustomJSTickFormatter, FixedTicker, HoverTool, Range1d

    length = max(story.ended - story.began, 1e-3)
    timeline = _figure(
        width=WIDTH,
        height=110 + min(26 * max(len(rows), 2), 900),
        x_range=Range1d(0, length, bounds="auto"),
        y_range=Range1d(-0.6, max(len(rows), 1) - 0.4),
        x_axis_label="seconds",
    )
    hovers = []
    for kind in KINDS:
        boxes = _boxes(story, rows, kind)
        if boxes["left"]:
            style: dict[str, Any] = {"fill_color": COLORS[kind], "line_color": None, "legend_label": CALLED[kind]}
            hovers.append(timeline.quad("left", "right", "bottom", "top", source=ColumnDataSource(boxes), **style))
    tips = [("", "@row"), ("@kind", "@spent{0.000} s of @length{0.000} s"), ("worker", "@worker"),
            ("attempt", "@attempt"), ("", "@text")]  # fmt: skip
    timeline.add_tools(HoverTool(renderers=hovers, tooltips=tips))
    crosses = []
    for kind, (marker, color) in MARKS.items():
        marks = _marks(story, rows, kind)
        if marks["x"]:
            cross = {"marker": marker, "size": 9, "line_width": 2, "color": color}
            crosses.append(timeline.scatter("x", "y", source=ColumnDataSource(marks), **cross))
    if crosses:
        timeline.add_tools(HoverTool(renderers=crosses, tooltips="@text"))
    names = [each.name for each in reversed(rows)]
    timeline.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))
    timeline.yaxis.formatter = CustomJSTickFormatter(args={"names": names}, code="return names[tick] ?? ''")
    timeline.ygrid.grid_line_color = None
    if timeline.legend:
        timeline.add_layout(timeline.legend[0], "above")
        timeline.legend.orientation = "horizontal"
        timeline.legend.click_policy = "hide"
        timeline.legend.border_line_color = None
    return timeline


def _boxes(story: Story, rows: Sequence[_Named], kind: str) -> dict[str, list[Any]]:
    """Where pieces of a kind are drawn: over those of the kinds before it, each as high as its share."""
    names = ("left", "right", "bottom", "top", "kind", "spent", "length", "row", "worker", "attempt", "text")
    boxes: dict[str, list[Any]] = {name: [] for name in names}
    before = KINDS[: KINDS.index(kind)]
    for at, each in enumerate(rows):
        for piece in each.row.pieces:
            spent, length = piece.seconds.get(kind, 0.0), piece.end - piece.start
            if not spent or length <= 0:
                continue
            foot = len(rows) - 1 - at - 0.4
            bottom = foot + 0.8 * min(1.0, sum(piece.seconds.get(other, 0.0) for other in before) / length)
            top = min(foot + 0.8, bottom + 0.8 * spent / length)
            worker = each.row.workers.get(str(piece.attempt), "")
            values = (piece.start - story.began, piece.end - story.began, bottom, top, kind, spent, length, each.name,
                      worker, piece.attempt, piece.text)  # fmt: skip
            for name, value in zip(names, values):
                boxes[name].append(value)
    return boxes


def _marks(story: Story, rows: Sequence[_Named], kind: str) -> dict[str, list[Any]]:
    marks: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    for at, each in enumerate(rows):
        for mark in each.row.marks:
            if mark.kind == kind:
                marks["x"].append(mark.time - story.began)
                marks["y"].append(len(rows) - 1 - at)
                marks["text"].append(mark.text)
    return marks


def _computing(story: Story, shares: Shares, x_range: Any) -> Any:
    from bokeh.models import BasicTicker, Range1d

    most = max(1.0, float(np.ceil(shares.computing.max(initial=0.0) - 1e-6)))
    chart = _figure(
        width=WIDTH, height=150, x_range=x_range, y_range=Range1d(0, most * 1.05), x_axis_label="seconds",
        y_axis_label="at once",
    )  # fmt: skip
    chart.yaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=4, num_minor_ticks=0)
    together = len(shares.computing) // COARSE
    computing = shares.computing.reshape(-1, together).mean(axis=1)
    edges = np.repeat(shares.edges[::together] - story.began, 2)[1:-1]
    chart.varea(edges, np.zeros(len(edges)), np.repeat(computing, 2), color=COLORS["compute"], alpha=0.7)
    return chart


def _lines(chart: Any, lines: Mapping[str, tuple[Any, Any]], tips: Sequence[tuple[str, str]], **style: Any) -> Any:
    """Draw lines by their names, and tell of the points of each."""
    from bokeh.models import ColumnDataSource, HoverTool

    drawn = []
    for at, (name, (x, y)) in enumerate(list(lines.items())[:MOST]):
        source = ColumnDataSource({"x": np.asarray(x, float), "y": np.asarray(y, float), "name": [name] * len(x)})
        options = {"color": LINES[at % len(LINES)], "line_width": 2, **style}
        if len(lines) <= len(LINES):
            options["legend_label"] = name
        drawn.append(chart.line("x", "y", source=source, **options))
        if len(x) < 3:  # too few for a line to be seen
            chart.scatter("x", "y", source=source, color=options["color"], size=6)
    chart.add_tools(HoverTool(renderers=drawn, tooltips=[("", "@name"), *tips]))
    if chart.legend:
        chart.add_layout(chart.legend[0], "above")
        chart.legend.orientation = "horizontal"
        chart.legend.ncols = 3
        chart.legend.border_line_color = None
        chart.legend.label_text_font_size = "10px"
    return chart


def _curves(story: Story) -> Iterator[tuple[str, Any]]:
    """A figure a run and metric, with its values on all sets."""
    for number, run in enumerate(story.runs):
        by_metric: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
        for name, curve in run.curves.items():
            if curve:
                metric = name.rpartition("-")[2].removeprefix("val_")
                by_metric.setdefault(metric, {})[name] = [step for step, _ in curve], [value for _, value in curve]
        for metric, lines in list(by_metric.items())[:METRICS]:
            label = f"{metric}, {number + 1} {run.label}" if len(story.runs) > 1 else metric
            chart = _figure(x_axis_label="step", y_axis_label=label)
            yield f"curve-{number}-{metric}", _lines(chart, lines, [("step", "@x{0}"), (metric, "@y{0.00000}")])


def _fed(story: Story, rows: Sequence[_Named], x_range: Any) -> Iterator[tuple[str, Any]]:
    """Rows and bytes a second, of each member."""
    from bokeh.models import NumeralTickFormatter

    edges = np.linspace(story.began, max(story.ended, story.began + 1e-3), RATES + 1)
    middles = (edges[1:] + edges[:-1]) / 2 - story.began
    for what, name in ((2, "rows"), (3, "bytes")):
        rates = {each.name: _rate(each.row, what, edges) for each in rows}
        rates = {called: rate for called, rate in rates.items() if rate.any()}
        if not rates:
            continue
        unit, size = _unit(max(rate.max() for rate in rates.values())) if name == "bytes" else ("rows", 1.0)
        chart = _figure(x_range=x_range, x_axis_label="seconds", y_axis_label=f"{unit} a second")
        chart.yaxis.formatter = NumeralTickFormatter(format="0[.]0 a")
        chart.y_range.start = 0
        lines = {called: (middles, rate / size) for called, rate in rates.items()}
        yield f"fed-{name}", _lines(chart, lines, [("second", "@x{0.0}"), (f"{unit} a second", "@y{0,0.0}")])


def _unit(most: float) -> tuple[str, float]:
    """The unit in which bytes are told, and how many it is.

    >>> _unit(3e6)
    ('MiB', 1048576.0)
    """
    power = max(0, min(4, int(np.log2(max(most, 1.0)) // 10)))
    return ("bytes", "KiB", "MiB", "GiB", "TiB")[power], float(1024**power)


def _rate(row: Row, what: int, edges: Any) -> Any:
    """Rows or bytes a second within each slice."""
    rate = np.zeros(len(edges) - 1)
    for piece in row.fed:
        start, end = piece[0], max(piece[1], piece[0] + 1e-6)
        rate += piece[what] * np.diff(np.clip(edges, start, end)) / (end - start)
    return rate / np.diff(edges)


def _memory(story: Story, rows: Sequence[_Named], x_range: Any) -> Any:
    from bokeh.models import Span

    held = {each.name: np.array(each.row.memory, float).T for each in rows if each.row.memory}
    most = max(float(values[1].max()) for values in held.values())
    unit, size = _unit(most)
    chart = _figure(width=WIDTH, height=240, x_range=x_range, x_axis_label="seconds", y_axis_label=unit)
    chart.y_range.start = 0
    for limit in {each.row.limit for each in rows if 0 < each.row.limit < 3 * most}:
        chart.add_layout(Span(location=limit / size, dimension="width", line_dash="dashed", line_color="#b3261e"))
        chart.y_range.end = limit / size * 1.05
    lines = {name: (values[0] - story.began, values[1] / size) for name, values in held.items()}
    return _lines(chart, lines, [("second", "@x{0.0}"), (unit, "@y{0,0.0}")])


def _placed(story: Story) -> Iterator[tuple[str, Any]]:
    """A figure a set: the partitions of each member, side by side, as long as they have rows."""
    from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter

    for number, run in enumerate(story.runs):
        sets = next((attempt.sets for attempt in reversed(run.attempts) if attempt.sets), {})
        names = list(run.rows)
        for name, lie in sets.items():
            ranks = sorted(set(lie["ranks"]))
            boxes: dict[str, list[Any]] = {key: [] for key in ("y", "left", "right", "part", "rows", "bytes", "color")}
            ends = dict.fromkeys(ranks, 0)
            for part, (rank, rows) in enumerate(zip(lie["ranks"], lie["rows"])):
                boxes["y"].append(names[rank] if rank < len(names) else str(rank))
                boxes["left"].append(ends[rank])
                ends[rank] += rows
                boxes["right"].append(ends[rank])
                boxes["part"].append(part)
                boxes["rows"].append(rows)
                boxes["bytes"].append(lie["nbytes"][part] if part < len(lie["nbytes"]) else 0)
                boxes["color"].append(LINES[part % len(LINES)])
            members = list(dict.fromkeys(boxes["y"]))[::-1]
            chart = _figure(height=110 + 24 * len(members), y_range=members, x_axis_label=f"rows of {name}")
            chart.x_range.start = 0
            chart.xaxis.formatter = NumeralTickFormatter(format="0[.]0 a")
            style = {"fill_color": "color", "line_color": "white", "fill_alpha": 0.8}
            bars = chart.hbar("y", left="left", right="right", height=0.7, source=ColumnDataSource(boxes), **style)
            tips = [("partition", "@part"), ("rows", "@rows{0,0}"), ("bytes", "@bytes{0,0}")]
            chart.add_tools(HoverTool(renderers=[bars], tooltips=tips))
            yield f"placed-{number}-{name}", chart
