"""The README, followed word for word: its blocks run as they stand, one after another, in a fresh Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"

#: What the README takes for granted: a table on disk, a model, functions of one's own.
GIVEN = """
import dask.array as da, keras, numpy as np, pandas as pd, pathlib

rng = np.random.default_rng(0)
pathlib.Path("flights").mkdir()
for part in range(3):
    table = pd.DataFrame({"distance": rng.random(300), "hour": rng.integers(0, 24, 300)})
    table.assign(late=(table["hour"] > 17).astype("int8")).to_parquet(f"flights/{part}.parquet")

X, Xv = (da.random.default_rng(0).random((rows, 3), chunks=(128, 3)).astype("float32") for rows in (1024, 256))
y, yv = (rows[:, 0].round().astype("int32") for rows in (X, Xv))

def build_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    return model

def train_one(trial):
    return {"loss": trial}

def fitted(model):
    return model if model.fit(x, y, verbose=0) else None

model, trials = build_model(), [0.5, 0.25, 0.125]
"""

#: What stands in for what no test has: a shared folder, GPUs.
INSTEAD = {'"/shared/run-1"': '"run-1"', "DevicePool(client) as": 'DevicePool(client, devices={"0": ["a", "b"]}) as'}

#: What a reader sees of each block, by the heading above it.
LOOKS = {
    "XGBoost": "assert ((late.compute() > 0.5) == (df['late'].compute() == 1)).all()",
    "Keras": """
assert len(history.history["val_loss"]) == 10
assert probabilities.compute().shape == (1024, 1)
assert np.allclose(model.evaluate(X.compute(), y.compute(), verbose=0), [loss, accuracy])
""",
    "TensorFlow": "assert len(history.history['loss']) == 3",
    "Jobs that own their GPUs": "assert sorted(each.result()['loss'] for each in futures) == sorted(trials)",
    "What a run did": "assert 'dask-bridges-story' in pathlib.Path('run.html').read_text()",
    "Models that move": "assert type(trained.result()).__name__ == 'Sequential'",
}
#: What names mean from here on.
BEFORE = {"Models that move": "train, x, y = fitted, X.compute(), y.compute()"}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_every_block_runs_as_it_stands(tmp_path: Path) -> None:
    sections = re.findall(r"^## (.+)\n(?s:(.*?))(?=^## |\Z)", README.read_text(), re.MULTILINE)
    blocks = {name: block for name, text in sections for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)}
    assert blocks.keys() == LOOKS.keys()
    program = GIVEN
    for name, block in blocks.items():
        for there, here in INSTEAD.items():
            block = block.replace(there, here)
        program += "\n".join(["", BEFORE.get(name, ""), block, LOOKS[name]])
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=560)
    assert ran.returncode == 0, ran.stderr[-4000:]
