"""Make `report.png` anew: flights, three workers, one of which is killed.

Needs Chromium. Run: python docs/report_picture.py
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from distributed import Client, wait

import dask_bridges
import dask_xgboost
from dask_bridges.demo import flights
from dask_bridges.events import Progress

PICTURE, SIZE = Path(__file__).with_name("report.png"), "1240,1570"
ROUNDS, KILLED_AFTER = 160, 70
PARAMETERS = {
    "objective": "binary:logistic",
    "eval_metric": ["logloss", "auc"],
    "max_depth": 8,
    "learning_rate": 0.08,
    "min_child_weight": 50,
    "subsample": 0.8,
}


def kill_one(client: Client, pid: int) -> None:
    """Kill a process once the training of this client is far enough."""
    done = 0
    while done < KILLED_AFTER:
        time.sleep(0.1)
        told = [event for gang in dask_bridges.gangs(client) for event in gang.events()]
        done = max([event.done for event in told if isinstance(event, Progress)], default=0)
    os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Train, and take the picture."""
    with Client(n_workers=3, threads_per_worker=1, dashboard_address=":0") as client:
        data = flights.load(client)
        train, valid = client.persist([data.train, data.valid])
        wait([train, valid])
        pid = list(client.run(os.getpid).values())[1]
        threading.Thread(target=kill_one, args=(client, pid), daemon=True).start()
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "run.html"
            dask_xgboost.train(
                client, PARAMETERS, train, flights.LABEL, num_boost_round=ROUNDS,
                evals=[(train, "train"), (valid, "valid")], verbose_eval=False, report=page,
            )  # fmt: skip
            command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
            subprocess.run(
                [
                    command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={folder}/profile", f"--window-size={SIZE}", "--virtual-time-budget=20000",
                    f"--screenshot={PICTURE}", page.as_uri(),
                ],
                check=True, timeout=120,
            )  # fmt: skip


if __name__ == "__main__":
    main()
