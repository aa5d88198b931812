"""A page, as a browser sees it: what it draws, and what it complains of."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NAMES", "Seen", "browser", "look_at"]

NAMES = ("chromium", "chromium-browser", "google-chrome")

#: Before all others on the page: what goes wrong is noted.
_BEFORE = """<script>
window.problems = [];
window.addEventListener("error", (event) => window.problems.push(String(event.message)), true);
window.addEventListener("unhandledrejection", (event) => window.problems.push(String(event.reason)));
const error = console.error;
console.error = (...words) => { window.problems.push(words.join(" ")); error(...words); };
</script>"""

#: After all others: once all is drawn, what is there is written down.
_AFTER = """<pre id="seen"></pre><script>
function counted(model) {
  const count = {};
  for (const renderer of model.renderers) {
    const source = renderer.data_source;
    if (source) count[renderer.glyph.type] = (count[renderer.glyph.type] ?? 0) + source.get_length();
  }
  return count;
}
function look() {
  const documents = window.Bokeh ? Bokeh.documents : [];
  if (!documents.length || !documents.every((each) => each.is_idle)) return setTimeout(look, 50);
  const figures = Object.fromEntries(documents[0].roots().map((root) => [root.name, counted(root)]));
  const text = JSON.stringify({ problems: window.problems, figures, text: document.body.innerText.slice(0, 3000) });
  document.getElementById("seen").textContent = text;
}
look();
</script>"""


@dataclass(frozen=True)
class Seen:
    """What there was to see.

    Attributes
    ----------
    problems : list of str
        Errors of scripts, and what was written to the console as one.
    figures : dict of str to dict
        Of each figure, by its name, how much was drawn by kind of glyph.
    text : str
    """

    problems: list[str]
    figures: dict[str, dict[str, int]]
    text: str


def browser() -> str | None:
    """The command of a browser of Chromium's kind, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look_at(page: Path, folder: Path) -> Seen:
    """Open a page in a browser without a window."""
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{_BEFORE}", 1)
    watched = folder / "watched.html"
    watched.write_text(text.replace("</body>", f"{_AFTER}</body>"), encoding="utf-8")
    command = browser()
    assert command is not None
    run = subprocess.run(
        [
            command, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--window-size=1240,2000", "--virtual-time-budget=20000", "--dump-dom", watched.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search('<pre id="seen">(.+?)</pre>', run.stdout, re.DOTALL)
    assert found, f"nothing was drawn: {run.stderr[-2000:]}"
    return Seen(**json.loads(html.unescape(found[1])))
