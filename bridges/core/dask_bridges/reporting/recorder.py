"""The report of a run: one page that shows who did what when, made of events alone.

``report="run.html"`` is an argument of what starts a run; `report` is for several together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_bridges import events
from dask_bridges.errors import BridgeError
from dask_bridges.events import Event, EventStream

if TYPE_CHECKING:
    from dask_bridges.reporting.story import Story

__all__ = ["Recorder", "asked", "read", "report", "reported", "written"]

logger = logging.getLogger(__name__)

#: Where the page holds its story: the text between these two.
BEGIN, END = '<script type="application/json" id="dask-bridges-story">', "</script>"


class Recorder:
    """A listener that makes a page of what it hears.

    Parameters
    ----------
    path : str or Path
        Of the page.

    Raises
    ------
    ValueError
        If nothing can be written there.
    BridgeError
        If Bokeh is not installed.
    """

    #: Members are to tell what their time goes into.
    detail = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from dask_bridges.reporting.story import Story

        self.path = _checked(path)
        self.story: Story = Story(time.time())
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        with self._lock:
            self.story.add(event)

    def attach(self, stream: EventStream) -> None:
        """Hear of what a gang does that is about to start."""
        stream.listen(self)

    def write(self, error: BaseException | None = None) -> None:
        """Write the page, with what has come so far; what went wrong is in it.

        A page that cannot be written is a warning: the run was worth more.
        """
        from dask_bridges.reporting.page import page

        with self._lock:
            self.story.ended = time.time()
            if error is not None:
                self.story.error = f"{type(error).__name__}: {error}"
            plain = self.story.plain()
        try:
            text = page(plain, f"{BEGIN}{_as_json(plain)}{END}")
            _replace(self.path, text)
        except Exception as failure:
            logger.warning("the report %s could not be written: %s", self.path, failure, exc_info=True)

    async def around(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        """Await ``function(*args)``, and write the page at its end, whatever that is."""
        failure: BaseException | None = None
        try:
            return await function(*args)
        except BaseException as error:
            failure = error
            raise
        finally:
            await written(self, failure)

    # Around several

    def __enter__(self) -> Recorder:
        events.begun.append(self.attach)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._close()
        self.write(error)

    async def __aenter__(self) -> Recorder:
        return self.__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._close()
        await written(self, error)

    def _close(self) -> None:
        events.begun.remove(self.attach)

    def _repr_html_(self) -> str:
        from dask_bridges.about import card

        state = "written" if self.story.ended else "under way"
        return card(f"Report {self.path}: {state}", ["run", "attempts", "error"], [
            (run.label, len(run.attempts), run.error) for run in self.story.runs
        ])  # fmt: skip


def report(path: str | os.PathLike[str]) -> Recorder:
    """One page of all that is trained, and run on devices, by this process within.

    A context manager, also an asynchronous one. The page is written when it is left, also by an exception.

    Parameters
    ----------
    path : str or Path
        Of the page, an HTML file that needs nothing else; what is there is replaced.

    Returns
    -------
    Recorder

    Raises
    ------
    ValueError
        If nothing can be written there.
    BridgeError
        If Bokeh is not installed.

    Examples
    --------
    >>> import dask_bridges
    >>> with dask_bridges.report("run.html"):  # doctest: +SKIP
    ...     booster = dask_xgboost.train(client, params, X, y)
    ...     history = dask_keras.fit(client, model, X, y)
    """
    return Recorder(path)


def asked(path: str | os.PathLike[str] | None) -> Recorder | None:
    """A recorder, where a report was asked for; raises as `report` does."""
    return None if path is None else Recorder(path)


async def written(recorder: Recorder | None, error: BaseException | None = None) -> None:
    """Have the page written, if there is to be one, beside the event loop."""
    if recorder is not None:
        await asyncio.shield(asyncio.to_thread(recorder.write, error))


async def reported(recorder: Recorder | None, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """Await ``function(*args)``, with a report of it where that was asked for."""
    return await (function(*args) if recorder is None else recorder.around(function, *args))


def read(path: str | os.PathLike[str]) -> Story:
    """What a page tells.

    Raises
    ------
    ValueError
        If it is no report.
    """
    from dask_bridges.reporting.story import Story

    _, begin, rest = Path(path).read_text(encoding="utf-8").partition(BEGIN)
    if not begin:
        raise ValueError(f"{path} is no report of dask-bridges")
    return Story.from_plain(json.loads(rest.partition(END)[0]))


def _as_json(plain: dict[str, Any]) -> str:
    """For a script element, which must not see its end in it."""
    return json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")


def _checked(path: str | os.PathLike[str]) -> Path:
    """Refuse, before anything starts, what could not be written at its end."""
    given, path = path, Path(path).expanduser().absolute()
    if find_spec("bokeh") is None:
        raise BridgeError(f'report={str(given)!r} needs Bokeh: pip install "dask-bridges[report]"')
    why = ""
    try:
        if path.is_dir():
            why = "it is a folder"
        elif path.exists() and not os.access(path, os.W_OK):
            why = "it is write-protected"
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = f"{error.strerror}: {path.parent}"
    if why:
        raise ValueError(f"report={str(given)!r} cannot be written, {why}. Give the name of a file, such as 'run.html'")
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
