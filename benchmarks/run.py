"""Run the benchmarks, each as a process of its own, and write the page of what they have measured.

What each has measured is kept in ``bench-output/``: a run of some of them updates their sections alone. A script that
fails, or is not over in time, is named on the page, and this ends with an error.

Run: python benchmarks/run.py [name ...]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import page
from results import KEEP, read

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "bench-output"
PAGE = HERE.parent / "docs" / "benchmarks.md"

#: What may bear on the figures, where it is installed.
PACKAGES = (
    "dask-bridges", "dask", "distributed", "numpy", "scipy", "xgboost", "xgboost-cpu", "keras", "tensorflow",
    "tensorflow-cpu", "dask-glm", "dask-ml",
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A script, and how it is run for the page."""

    name: str
    title: str
    #: All together take 15 minutes on 2 quick cores, 30 on slow ones.
    arguments: tuple[str, ...] = ()
    #: Seconds after which it has failed.
    limit: float = 600
    drawn: bool = False


BENCHMARKS = (
    Benchmark(
        "xgboost_train",
        "XGBoost",
        ("--only", "cold,repeated,tiny,predict", "--repeats", "3"),
        drawn=True,
    ),
    Benchmark("keras_fit", "Keras", ("--passes", "5"), drawn=True),
    Benchmark("tf_cluster", "A TensorFlow cluster"),
    Benchmark("tf_feed", "Rows for TensorFlow"),
    Benchmark("glm", "Logistic regression", ("--repeats", "3"), drawn=True),
    Benchmark("models_moving", "Models that move", ("--repeats", "3", "--rounds", "400"), drawn=True),
    Benchmark("device_jobs", "Jobs that own their devices", drawn=True),
    Benchmark("detection", "Deaths", ("--seeds", "2", "--quick", "--patience", "20")),
    Benchmark("gang_cost", "A gang by itself"),
    Benchmark("spool", "The spool"),
    Benchmark("report_cost", "The report of a run", ("--pairs", "3")),
)


def machine() -> tuple[str, str]:
    """What is measured on: cores, memory and processor; and versions."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = f"{CPU_COUNT} {'core' if CPU_COUNT == 1 else 'cores'}"
    hardware = (
        f"{cores} of {model or platform.machine()}, {MEMORY_LIMIT / 2**30:.0f} GiB of memory, {platform.system()}"
    )
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return hardware, ", ".join(versions)


def run(benchmark: Benchmark) -> None:
    """Run a script, and keep what it tells and how it ended."""
    lines = KEPT / f"{benchmark.name}.jsonl"
    lines.unlink(missing_ok=True)
    lines.touch()
    command = [sys.executable, str(HERE / f"{benchmark.name}.py"), *benchmark.arguments]
    start, when = time.monotonic(), datetime.datetime.now(datetime.UTC)
    failed = _wait(subprocess.Popen(command, env={**os.environ, KEEP: str(lines)}), benchmark.limit)
    kept = {
        "when": f"{when:%Y-%m-%d %H:%M} UTC",
        "seconds": time.monotonic() - start,
        "failed": failed,
        "machine": machine(),
        "found": [json.loads(line) for line in lines.read_text().splitlines()],
    }
    (KEPT / f"{benchmark.name}.json").write_text(json.dumps(kept, indent=1))
    lines.unlink()


def _wait(process: subprocess.Popen[Any], limit: float) -> str | None:
    """Why a script did not come to its end, in words; None where it did. Nothing that it has started is left."""
    started: list[psutil.Process] = []
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        started = psutil.Process(process.pid).children(recursive=True)
        return f"not over after {limit:.0f} s"
    else:
        return f"exit status {status}" if status else None
    finally:
        process.kill()
        process.wait()
        for child in started:
            if child.is_running():
                child.kill()


def sections() -> list[page.Section]:
    """All benchmarks, with what is kept of their last runs."""
    made = []
    for benchmark in BENCHMARKS:
        file = KEPT / f"{benchmark.name}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept:
            kept |= {"found": tuple(read(kept["found"])), "machine": tuple(kept["machine"])}
        text = page.text(HERE / f"{benchmark.name}.py")
        made.append(page.Section(benchmark.name, benchmark.title, text, drawn=benchmark.drawn, **kept))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="name", help=f"of {', '.join(names)}; without, all")
    only = parser.parse_args(arguments).only
    if unknown := set(only) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(names)}")
    KEPT.mkdir(exist_ok=True)
    start = time.monotonic()
    for benchmark in BENCHMARKS:
        if not only or benchmark.name in only:
            print(f"\n=== {benchmark.title}: {benchmark.name}.py", flush=True)
            run(benchmark)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    made = sections()
    complete = all(section.found is not None for section in made)
    target = PAGE if complete else KEPT / PAGE.name
    page.write(made, target)
    print(f"The page: {target}" + ("" if complete else f"; not {PAGE}, since some have never been run"))
    if failed := [f"{section.name} ({section.failed})" for section in made if section.failed]:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
