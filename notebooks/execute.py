"""Execute notebooks from top to bottom and keep their outputs: ``make notebooks``.

Each runs in a kernel of its own, in an empty folder, so that nothing it writes stays
and nothing it shows says where it ran.

Run: python notebooks/execute.py [notebooks/flights.ipynb ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

__all__ = ["FOLDER", "execute"]

FOLDER = Path(__file__).parent

#: What TensorFlow says of the processor, and tqdm of widgets that are not there, is for nobody.
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}

#: Seconds a cell may take.
CELL = 600


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with new outputs; an error of a cell is raised."""
    os.environ.update(QUIET)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=CELL, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # and not those of this Python
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def main() -> None:
    """Execute the notebooks named on the command line, or all, in place."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        start = time.monotonic()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
