"""`make bench` makes one page of what all scripts have measured, and says what is missing and what failed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"

#: As a script is: what it does, and what it measures.
SCRIPT = '''"""{what}.

It is bound by nothing.

Run: python {name}.py
"""

import subprocess, sys, time

sys.path.insert(0, {folder!r})
from results import missing, show

{body}
'''


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules that `make bench` runs."""
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("page", "results", "run")})
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def folder(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the repository: scripts are there, and the page and what is kept goes there."""
    monkeypatch.setattr(bench.run, "HERE", tmp_path)
    monkeypatch.setattr(bench.run, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(bench.run, "PAGE", tmp_path / "docs" / "benchmarks.md")
    (tmp_path / "docs").mkdir()
    return tmp_path


@pytest.fixture
def scripts(bench: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make these scripts the benchmarks."""

    def make(limit: float = 60, **bodies: str) -> None:
        for name, body in bodies.items():
            text = SCRIPT.format(what=f"What {name} takes", name=name, folder=str(SCRIPTS), body=body)
            (folder / f"{name}.py").write_text(text)
        made = tuple(
            bench.run.Benchmark(name, name.title(), (), limit, drawn=body == GOOD) for name, body in bodies.items()
        )
        monkeypatch.setattr(bench.run, "BENCHMARKS", made)

    return make


GOOD = """
found = {"ours": [1.0, 2.0, 3.0], "theirs": [4.0, 6.0, 9.0], "slow": [20.0, 20.0, 20.0], "alone": [1.0] * 3}
show("sorting", "s", found, ours="ours", limits=["alone"], notes={"ours": {"CPU s": "0.70"}}, white={"theirs": 0.25})
show("small matters", "ms", {"ours": [7.0]}, head=False)
missing("sorting", "another", ImportError("no module: /home/someone/lib/another.py"))
"""


def table(page: str, beginning: str) -> list[list[str]]:
    """Cells of the lines that begin so."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {beginning}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_ours_beside_the_best_peer_and_the_limit(bench: Any, folder: Path, scripts: Any) -> None:
    scripts(good=GOOD)
    bench.run.main([])
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert table(page, "Good: ") == [
        ["Good: sorting", "2.00 s (1.00 to 3.00)", "6.00 s, theirs", "× 3.00", "1.00 s, alone (× 0.500)"]
    ]
    assert ["sorting", "**ours**", "2.00 s", "1.00 to 3.00", "", "", "0.70"] in table(page, "sorting")
    assert "25%" in page
    assert "What good takes." in page
    assert "It is bound by nothing." in page
    assert "Run: python" not in page
    assert "![Good](benchmarks/good.png)" in page
    assert (folder / "docs" / "benchmarks" / "good.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_on_what_and_when_but_not_where(bench: Any, folder: Path, scripts: Any) -> None:
    scripts(good=GOOD)
    bench.run.main([])
    page = (folder / "docs" / "benchmarks.md").read_text()
    hardware, versions = bench.run.machine()
    assert hardware in page
    assert versions in page
    assert "GiB of memory" in hardware
    assert "dask " in versions
    assert str(folder) not in page
    assert "/home" not in page
    assert (".json" in page, "UTC" in page) == (False, True)


def test_a_missing_peer_is_named(bench: Any, folder: Path, scripts: Any) -> None:
    scripts(good="show('sorting', 's', {'ours': [1.0]}, ours='ours')\nmissing('sorting', 'another', 'no such package')")
    bench.run.main([])
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert "**Missing**: another, in Good, sorting: no such package." in page
    assert table(page, "Good: ")[0][2] == "missing: another"


def test_a_script_that_fails_is_named_and_ends_it_with_an_error(bench: Any, folder: Path, scripts: Any) -> None:
    scripts(bad="show('first', 's', {'ours': [1.0]})\nsys.exit(3)", good=GOOD)
    with pytest.raises(SystemExit, match=r"bad \(exit status 3\)"):
        bench.run.main([])
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert "**Failed**: Bad, exit status 3." in page
    assert table(page, "Bad: first")
    assert table(page, "Good: sorting")  # the others have run


def test_a_script_that_is_not_over_in_time_is_ended_with_all_it_has_started(
    bench: Any, folder: Path, scripts: Any
) -> None:
    child = "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    scripts(1.0, slow=child + f"open({str(folder / 'pid')!r}, 'w').write(str(process.pid))\ntime.sleep(600)")
    with pytest.raises(SystemExit, match=r"slow \(not over after 1 s\)"):
        bench.run.main([])
    process = int((folder / "pid").read_text())
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_one_of_them_again_updates_its_section_alone(bench: Any, folder: Path, scripts: Any) -> None:
    tell = "show('work', 's', {{'ours': [{}]}})".format
    scripts(one=tell(1.0), two=tell(2.0))
    bench.run.main([])
    before = json.loads((folder / "kept" / "one.json").read_text())
    scripts(one=tell(3.0), two=tell(4.0))
    bench.run.main(["two"])
    page = (folder / "docs" / "benchmarks.md").read_text()
    assert [line[1] for name in ("One: ", "Two: ") for line in table(page, name)] == [
        "1.00 s (1.00 to 1.00)",
        "4.00 s (4.00 to 4.00)",
    ]
    assert json.loads((folder / "kept" / "one.json").read_text()) == before


def test_the_page_of_the_documentation_is_not_replaced_by_a_part_of_it(bench: Any, folder: Path, scripts: Any) -> None:
    scripts(one="show('work', 's', {'ours': [1.0]})", two="")
    bench.run.main(["one"])
    assert not (folder / "docs" / "benchmarks.md").exists()
    assert "**Not run**: Two" in (folder / "kept" / "benchmarks.md").read_text()


def test_another_name_is_refused_with_those_there_are(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run.main(["xgboots"])
    assert "there are xgboost_train, " in capsys.readouterr().err


def test_every_script_is_run_and_says_what_bounds_it(bench: Any) -> None:
    texts = {file.stem: bench.page.text(file) for file in SCRIPTS.glob("*.py") if "\nRun: " in file.read_text()}
    texts.pop("run")
    assert set(texts) == {benchmark.name for benchmark in bench.run.BENCHMARKS}
    assert [name for name, text in texts.items() if "bound" not in text] == []


def test_a_script_alone_prints_its_table(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 4.0, 6.0]}
    bench.results.show("sorting", "rows/s", found, ours="ours", more=True)
    assert "x 0.500" in capsys.readouterr().out
