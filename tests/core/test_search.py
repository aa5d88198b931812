"""The examples of the page on jobs run as they stand, with fewer trials where that makes no difference."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "jobs.md"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(170),
    pytest.mark.skipif(sys.platform != "linux", reason="child processes need Linux"),
]


def run(containing: str, *instead: str) -> dict[str, Any]:
    """Run the example that contains a string, with one text `instead` of another; what it has defined."""
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if containing in block
    ]
    if instead:
        assert code.count(instead[0]) == 1
        code = code.replace(*instead)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code, names)
    return names


@pytest.mark.slow
def test_many_small_models_two_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("keras")
    run("def train_one(width):")
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line.partition(":")[0].split() for line in lines] == [[str(width), "units"] for width in (8, 16, 32, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "trials", [8, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(600)])], ids=["short", "all 50"]
)
def test_a_study_of_optuna_with_pruning(trials: int) -> None:
    pytest.importorskip("keras")
    optuna = pytest.importorskip("optuna")
    states = optuna.trial.TrialState
    study = run("optuna.create_study", "TRIALS, DEVICES = 50", f"TRIALS, DEVICES = {trials}")["study"]
    ended = [trial.state for trial in study.trials]
    assert len(ended) == trials
    assert set(ended) <= {states.COMPLETE, states.PRUNED}
    assert all(trial.intermediate_values for trial in study.trials)
    if trials == 50:
        assert states.PRUNED in ended
        assert study.best_value > 0.85


def test_a_random_search_of_scikit_learn() -> None:
    pytest.importorskip("xgboost")
    names = run("ParameterSampler")
    assert len(names["losses"]) == 20
    assert names["loss"] == min(names["losses"]) < 1.0
