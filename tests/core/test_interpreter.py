"""A fault of CPython that would have workers with many jobs stand still."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: The collector runs while frames are looked at, and lets threads go on that end at this moment.
LOOKS = """
import gc, sys, threading, time, weakref
from dask_bridges.processes.interpreter import guard_current_frames
{guard}

class Ring:
    pass

kept = []

def litter():
    for _ in range(20):
        ring = Ring()
        ring.itself = ring
        kept.append(weakref.ref(ring, lambda _: time.sleep(0.001)))

gc.set_threshold(1)
end = time.monotonic() + 2
while time.monotonic() < end:
    gc.disable()
    litter()
    for _ in range(10):
        threading.Thread(target=time.sleep, args=(0.0005,)).start()
    gc.enable()
    assert threading.get_ident() in sys._current_frames()
    assert gc.isenabled()
    kept.clear()
print("went on")
"""


def looks(guard: str, timeout: float) -> str:
    run = subprocess.run(
        [sys.executable, "-c", LOOKS.format(guard=guard)], capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_process_that_looks_at_its_frames_goes_on_while_threads_end() -> None:
    assert looks("guard_current_frames()", 60) == "went on"


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python has it mended, or its turn to be looked at")
def test_python_still_needs_the_guard() -> None:
    with pytest.raises(subprocess.TimeoutExpired):  # where this fails, the guard can go
        looks("", 30)


ENDED = """
import sys, threading
from dask_bridges.processes.interpreter import guard_current_frames
guard_current_frames()
thread = threading.Thread(target=int)
thread.start()
thread.join()
print(sys._current_frames()[thread.ident])
"""


def test_a_thread_that_ends_while_dask_looks_has_no_frame() -> None:
    run = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60)
    assert (run.stdout.strip(), run.returncode) == ("None", 0), run.stderr
