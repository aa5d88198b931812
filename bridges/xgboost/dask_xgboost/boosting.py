"""The rounds of one rank: those of `xgboost.train`, which may begin where another attempt was interrupted."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xgboost as xgb

from dask_xgboost.resuming import Keeper, State, plain, restore

__all__ = ["Rounds"]


@dataclass(frozen=True)
class Rounds:
    """What `xgboost.train` is told, and from where to go on.

    Attributes
    ----------
    params : dict
    total : int
        Rounds.
    every : int
        Rounds of a segment, see `train`.
    model : bytes or None
        To begin with.
    callbacks : sequence of TrainingCallback
        Ours, the user's, and that of early stopping.
    remembering : sequence of TrainingCallback
        Those of them whose state is kept.
    agreed : callable
        ``agreed(wanted)``: whether all ranks end, since one of them wants to.
    obj, custom_metric : callable or None
    """

    params: dict[str, Any]
    total: int
    every: int
    model: bytes | None
    callbacks: Sequence[Any]
    remembering: Sequence[Any]
    agreed: Callable[[bool], bool] = bool
    obj: Any = None
    custom_metric: Any = None

    def boost(
        self, matrix: Any, evals: Sequence[tuple[Any, str]], keeper: Keeper | None, state: State | None
    ) -> tuple[xgb.Booster, dict[str, dict[str, list[float]]]]:
        """Train; the booster, and the history of its metrics."""
        container = xgb.callback.CallbackContainer(
            self.callbacks, metric=self.custom_metric, output_margin=callable(self.obj)
        )
        booster = container.before_training(self._begin([matrix, *(other for other, _ in evals)], state))
        start = 0
        if state is not None:
            start = state.round
            restore(self.remembering, state)
            container.history.update({name: OrderedDict(log) for name, log in state.history.items()})
        for number in range(start, self.total):
            if number > start and number % self.every == 0:
                self._begin_segment(booster, number)
            ends = container.before_iteration(booster, number, matrix, evals)
            if self.remembering and self.agreed(ends):
                break
            booster.update(matrix, iteration=number, fobj=self.obj)
            if self.agreed(container.after_iteration(booster, number, matrix, evals)):
                break
            done = number + 1
            if keeper is not None and done % self.every == 0 and done < self.total:
                keeper.keep(booster, container.history, done)
        return container.after_training(booster).reset(), plain(container.history)

    def _begin(self, matrices: Sequence[Any], state: State | None) -> xgb.Booster:
        if state is None:
            return xgb.Booster(self.params, matrices, model_file=None if self.model is None else bytearray(self.model))
        booster = xgb.Booster(self.params, matrices, model_file=bytearray(state.model))
        booster.load_config(state.config)
        booster.set_param({"nthread": self.params.get("nthread", 0), **self._seed(state.round)})
        return booster

    def _begin_segment(self, booster: xgb.Booster, number: int) -> None:
        """Bring XGBoost's random numbers to where a booster has them that is loaded now.

        Its sampler of columns lives in the updaters, which are made anew with the configuration. What is predicted
        already is kept.
        """
        booster.load_config(booster.save_config())
        booster.set_param(self._seed(number))

    def _seed(self, number: int) -> dict[str, int]:
        """The seed of the segment that begins with this round."""
        return {"seed": zlib.crc32(f"{self.params.get('seed', 0)} {number // self.every}".encode()) >> 1}
