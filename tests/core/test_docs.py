"""The pages say what is there: links lead somewhere, and names, messages and errors are those of the code."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import dask_bridges
import dask_keras
import dask_serializers
import dask_tf
import dask_xgboost
from dask_serializers.pages import TROUBLESHOOTING

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")})
PACKAGES = (dask_bridges, dask_keras, dask_serializers, dask_tf, dask_xgboost)

#: Packages whose names are for their own bridge alone, or that are found under another name.
INTERNAL = ("dask_tf.training", "dask_serializers.keras", "dask_bridges.ui.doctor")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and MyST make them; of a page that is another one, that one's."""
    included = re.search(r"^```{include} (\S+)", page.read_text(), re.MULTILINE)
    if included:
        return anchors((page.parent / included[1]).resolve())
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# Links


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_inside_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue  # outside
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_there_are_links_to_look_at() -> None:
    assert sum(len(links(page)) for page in PAGES) > 50


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^([\w-]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_every_page_can_be_found_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    begins = {f"docs/{name}.md" for name in ("start", "deployment", "troubleshooting", "writing-a-bridge")}
    assert begins | {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} <= linked


# Errors


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        yield package
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(info.name)


def errors() -> dict[str, type[BaseException]]:
    """All classes of errors that a user may meet."""
    for _ in modules():  # defines them
        pass
    found: list[type[BaseException]] = [dask_bridges.BridgeError, dask_serializers.CannotMove]
    for kind in found:
        found += kind.__subclasses__()
    ours = {package.__name__ for package in PACKAGES}
    return {
        kind.__name__: kind
        for kind in found
        if not kind.__name__.startswith("_") and kind.__module__.partition(".")[0] in ours
    }


def test_every_class_of_errors_has_an_entry_to_which_its_message_leads() -> None:
    headings = anchors(ROOT / "docs/troubleshooting.md")
    assert {"MemberLost", "PeerLost", "ServerLost", "CannotMove"} <= errors().keys()
    for name, kind in errors().items():
        (note,) = kind("what was wrong").__notes__
        page, _, anchor = note.removeprefix("See ").partition("#")
        assert page == TROUBLESHOOTING
        assert anchor in headings, name


def test_the_address_in_messages_is_below_that_of_the_documentation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert TROUBLESHOOTING.startswith(project["urls"]["Documentation"] + "/")
    assert (ROOT / "docs" / Path(TROUBLESHOOTING).name).with_suffix(".md").is_file()


@cache
def texts() -> str:
    """The code of all packages, with strings that are written over several lines as one."""
    files = [file for package in PACKAGES for file in Path(package.__path__[0]).rglob("*.py")]
    return re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", "\n".join(file.read_text() for file in files))


def messages() -> list[str]:
    rows = re.findall(r"^\| `(.+?)` ?[^|]*\|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    return [row for row in rows if row != "labels …"]


#: What Dask's nanny says, which goes on in our messages.
OF_DASK = {"killed by signal 9", "exceeded … memory budget"}


@pytest.mark.parametrize("message", [message for message in messages() if message not in OF_DASK])
def test_the_messages_that_are_explained_are_those_of_the_code(message: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    assert re.search(".{0,300}?".join(pieces), texts(), re.DOTALL)


# The reference


def documented() -> list[Any]:
    """Every object of which the page of the reference has the docstring."""
    page = (ROOT / "docs/api.md").read_text()
    found = [pkgutil.resolve_name(name) for name in re.findall(r"auto(?:function|class|exception):: (\S+)", page)]
    for name, options in re.findall(r"automodule:: (\S+)\n((?:   :.*\n)*)", page):
        module = importlib.import_module(name)
        members = re.search(r":members: (.+)", options)
        found += [getattr(module, member) for member in (members[1].split(", ") if members else module.__all__)]
    return found


def public() -> dict[str, Any]:
    """What packages offer, by name."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules()
        if hasattr(module, "__path__") and not module.__name__.startswith(INTERNAL)
        for name in getattr(module, "__all__", ())
        if name != "__version__"
    }


def test_every_public_name_is_in_the_reference() -> None:
    there = {id(thing) for thing in documented()}
    assert [name for name, thing in public().items() if id(thing) not in there] == []


# What pages say


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_examples_are_python(page: Path) -> None:
    for block in blocks(page):
        compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_and_settings_that_are_mentioned_are_there(page: Path) -> None:
    text = page.read_text()
    packages = "|".join(package.__name__ for package in PACKAGES)
    missing = []
    for name in re.findall(rf"`((?:{packages})(?:\.\w+)+)", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    settings = re.findall(r"`dask-bridges\.([a-z.-]+[a-z])", text)
    missing += [name for name in settings if name not in defaults()]
    assert missing == []


def defaults() -> dict[str, Any]:
    """Our settings, by name."""
    values = yaml.safe_load((Path(dask_bridges.__file__).with_name("dask-bridges.yaml")).read_text())["dask-bridges"]
    groups = {name: value for name, value in values.items() if isinstance(value, dict)}
    plain = {name: value for name, value in values.items() if name not in groups}
    return plain | {f"{group}.{name}": value for group, inner in groups.items() for name, value in inner.items()}


def test_the_configuration_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `([a-z.-]+)` \| (.+?) \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    said = {name: yaml.safe_load(value.strip("`")) for name, value in rows}
    assert said == defaults()
