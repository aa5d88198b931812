"""The page of all benchmarks, in Markdown with pictures, from what the scripts have kept."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import BETTER, LIMIT, OURS, PEER, Missing, Row, number

COLORS = {OURS: "#1f5fa8", PEER: "#e08a3c", LIMIT: "#b4b9bf"}
INTRODUCTION = f"""\
`make bench`, or `dask bridges bench` in a checkout, writes this page; `make bench ONLY=spool` repeats one section.

All contenders of a case do the same work in the same run, and take turns where they can, so that what slows the
machine down slows all of them. Figures are medians, with quartiles in brackets; what warms up is not counted.
*{BETTER}* is how many times as good as another ours is, pair by pair of runs: above 1 ours is better. *limit* is what
the machine gives at most, or the framework in one process, and in brackets how many times as good ours is.
"""
LEGEND = {OURS: "ours", PEER: "peer", LIMIT: "what the machine or one process gives"}


@dataclass(frozen=True)
class Section:
    """A script's part of the page: what it is, and what came of its last run."""

    #: The script's name without ending, which is also that of its picture.
    name: str
    title: str
    #: What is done, how it is measured and what bounds it.
    text: str
    #: None where it has not been run.
    found: tuple[Row | Missing, ...] | None = None
    #: Why the run did not come to its end; None where it did.
    failed: str | None = None
    when: str = ""
    seconds: float = 0.0
    #: Cores, memory, processor, and versions.
    machine: tuple[str, str] = ("", "")
    drawn: bool = False

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.found or () if isinstance(row, Row)]

    @property
    def missing(self) -> list[Missing]:
        return [row for row in self.found or () if isinstance(row, Missing)]


def text(script: Path) -> str:
    """A script's docstring, but for how it is run."""
    paragraphs = (ast.get_docstring(ast.parse(script.read_text())) or "").split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if not paragraph.startswith("Run: "))


def write(sections: Sequence[Section], page: Path) -> None:
    """Write the page, and pictures in a folder of its name beside it."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    for section in sections:
        if section.drawn and any(row.head for row in section.rows):
            draw(section, pictures / f"{section.name}.png")
    page.write_text(markdown(sections, {file.stem: f"{pictures.name}/{file.name}" for file in pictures.glob("*.png")}))


# Markdown


def markdown(sections: Sequence[Section], pictures: dict[str, str]) -> str:
    """The page; `pictures` are by the name of a section."""
    run = [section for section in sections if section.found is not None]
    newest = max(run, key=lambda section: section.when, default=None)
    lines = ["# Benchmarks", "", *(_measured(run, newest) if newest else []), INTRODUCTION, *_complaints(sections)]
    lines += _head(run)
    for section in sections:
        lines += ["", *_section(section, pictures.get(section.name), newest)]
    return "\n".join(lines).rstrip() + "\n"


def _measured(run: Sequence[Section], newest: Section) -> list[str]:
    days = sorted({section.when[:10] for section in run})
    took = sum(section.seconds for section in run) / 60
    dates = " to ".join(dict.fromkeys((days[0], days[-1])))
    hardware, versions = newest.machine
    return [f"Measured on {dates}, in {took:.0f} minutes, on {hardware}.", f"With {versions}.", ""]


def _complaints(sections: Sequence[Section]) -> list[str]:
    """What is not on the page, and why."""
    lines = [f"- **Failed**: {section.title}, {section.failed}." for section in sections if section.failed]
    for section in sections:
        lines += [f"- **Missing**: {row.name}, in {section.title}, {row.case}: {row.why}." for row in section.missing]
    if skipped := [section.title for section in sections if section.found is None]:
        lines.append(f"- **Not run**: {', '.join(skipped)}.")
    return [*lines, ""] if lines else []


def _head(sections: Iterable[Section]) -> list[str]:
    """The line of each case that belongs to the table at the head."""
    lines = [f"| what | ours | best peer | {BETTER} | limit |", "| --- | --- | --- | --- | --- |"]
    for section in sections:
        for case, rows in _cases(section.rows).items():
            ours = next(row for row in rows if row.role == OURS)
            if not ours.head:
                continue
            peers = sorted((row for row in rows if row.role == PEER), key=lambda row: row.median, reverse=ours.more)
            limit = next((row for row in rows if row.role == LIMIT), None)
            gone = [row.name for row in section.missing if row.case == case]
            peer = f"{_value(peers[0])}, {peers[0].name}" if peers else "; ".join(f"missing: {name}" for name in gone)
            cells = [
                f"{section.title}: {case}",
                f"{_value(ours)} {_spread(ours)}",
                peer or "-",
                _times(peers[0]) if peers else "-",
                f"{_value(limit)}, {limit.name} ({_times(limit)})" if limit else "-",
            ]
            lines.append(_line(cells))
    return lines if len(lines) > 2 else []


def _section(section: Section, picture: str | None, newest: Section | None) -> list[str]:
    lines = [f"## {section.title}", "", section.text, ""]
    if section.failed:
        lines += [f"**It failed**: {section.failed}. What was measured before:", ""]
    if picture:
        lines += [f"![{section.title}]({picture})", ""]
    if section.rows:
        notes = list(dict.fromkeys(heading for row in section.rows for heading in row.notes))
        white = ["white space"] if any(row.white is not None for row in section.rows) else []
        headings = ["case", "contender", "median", "quartiles", BETTER, *white, *notes]
        lines += [_line(headings), _line(["---"] * len(headings))]
        for case, rows in _cases(section.rows).items():
            for at, row in enumerate(rows):
                name = f"**{row.name}**" if row.role == OURS else row.name
                cells = ["" if at else case, name, _value(row), _spread(row)[1:-1], _times(row) if row.ratio else ""]
                cells += ["" if row.white is None else f"{row.white:.0%}" for _ in white]
                lines.append(_line([*cells, *(row.notes.get(heading, "") for heading in notes)]))
        lines.append("")
    lines += [f"Missing in *{row.case}*: {row.name}: {row.why}.\n" for row in section.missing]
    if section.found is None:
        return [*lines, "Not run."]
    there = "" if newest is None or section.machine == newest.machine else f", on {', '.join(section.machine)}"
    lines.append(f"`{section.name}.py`, {section.seconds:.0f} s, {section.when}{there}.")
    return lines


def _cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def _value(row: Row) -> str:
    return f"{number(row.median)} {row.unit}"


def _spread(row: Row) -> str:
    return f"({number(row.low)} to {number(row.high)})"


def _times(row: Row) -> str:
    return f"× {number(row.ratio)}" if row.ratio else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# Pictures


def draw(section: Section, file: Path) -> None:
    """A panel for each case at the head: bars of all contenders, with quartiles; white space is left white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    cases = _cases(row for row in section.rows if row.head)
    sizes = [len(rows) for rows in cases.values()]
    height = 0.34 * sum(sizes) + 0.62 * len(cases) + 0.5
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(8, height), squeeze=False, layout="constrained", height_ratios=[n + 0.4 for n in sizes]
    )
    for (case, rows), panel in zip(cases.items(), panels[:, 0]):
        _bars(panel, rows)
        better = ", more is better" if rows[0].more else ""
        panel.set_title(f"{case} ({rows[0].unit}{better})", loc="left", fontsize=9.5)
    handles = [Patch(color=color, label=LEGEND[role]) for role, color in COLORS.items()]
    if any(row.white for row in section.rows):
        handles.append(Patch(facecolor="white", edgecolor="#444444", label="white space: workers do not compute"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(file, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    most = max(row.high for row in rows)
    for at, row in enumerate(rows):
        busy = row.median * (1 - (row.white or 0))
        color = COLORS[row.role]
        panel.barh(at, row.median, 0.72, facecolor="white", edgecolor=color, linewidth=0.8)
        panel.barh(at, busy, 0.72, color=color, linewidth=0)
        error = [[max(0.0, row.median - row.low)], [max(0.0, row.high - row.median)]]
        panel.errorbar(row.median, at, xerr=error, color="#222222", capsize=2, linewidth=0.9)
        panel.text(max(row.median, row.high) + 0.012 * most, at, number(row.median), va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.14 * most)
    panel.tick_params(axis="x", labelsize=7.5)
    panel.spines[["top", "right"]].set_visible(False)
