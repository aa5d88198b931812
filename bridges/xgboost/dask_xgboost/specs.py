"""What the ranks of an attempt are told, and what is told of it to others: to who asks, and to who goes on from it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from dask_bridges import config
from dask_bridges.about import About
from dask_xgboost.datasets import Datasets
from dask_xgboost.dealing import Asked
from dask_xgboost.rank import Loop, TrainSpec
from dask_xgboost.ready import MatricesSpec
from dask_xgboost.residency import Residency
from dask_xgboost.resuming import Keeping, State
from dask_xgboost.seating import Seating

__all__ = ["Told"]


@dataclass(frozen=True)
class Told:
    """What every attempt of a training is told alike.

    Attributes
    ----------
    id : str
        Of the training.
    loop : Loop
    sets : Datasets
    folds : Asked or None
        Of a cross-validation.
    keeping : Keeping or None
        None where nothing is kept.
    """

    id: str
    loop: Loop
    sets: Datasets
    folds: Asked | None
    keeping: Keeping | None

    def described(self) -> dict[str, Any]:
        """What tells this training from others, for JSON."""
        model = self.loop.xgb_model
        return {
            "params": {name: str(value) for name, value in sorted(self.loop.params.items())},
            "features": self.sets.matrix.num_features,
            "rows": [matrix.rows for matrix in self.sets.each],
            "evals": [name for _, name in self.sets.evals],
            "checkpoint_every": self.loop.segment,
            "xgb_model": None if model is None else zlib.crc32(model),
        }

    def about(self, ranks: Sequence[str]) -> About:
        """What a report tells of it."""
        train, loop = self.sets.matrix, self.loop
        matrices = {"train": train, **{name: matrix for matrix, name in self.sets.evals if matrix is not train}}
        lying = {name: matrix.parts.lying(ranks) for name, matrix in matrices.items()}
        rounds = {"num_boost_round": loop.num_boost_round, "early_stopping_rounds": loop.early_stopping_rounds}
        return About(self.id, {**loop.params, **rounds, "checkpoint_every": loop.segment}, ("xgboost",), lying)

    def specs(self, seating: Seating, residency: Residency, state: State | None, *, finishing: bool) -> list[TrainSpec]:
        """By rank; `state` is what it goes on from, `finishing` whether it was asked to stop."""
        keeping = self.keeping
        if keeping is not None:
            keeping = replace(keeping, training=self.described(), placement=seating.placement)
        return [
            TrainSpec(
                self.loop,
                matrices,
                self.sets.numbered_evals,
                keeping=keeping,
                state=state,
                devices=seating.devices.get(worker),
                finishing=finishing,
                folds=None if self.folds is None else self.folds.on(self.sets.matrix, worker),
            )
            for worker, matrices in zip(seating.ranks, self._matrices(seating, residency, state))
        ]

    def _matrices(self, seating: Seating, residency: Residency, state: State | None) -> list[MatricesSpec]:
        sets, categories = self.sets, self.sets.categories()
        # With rows elsewhere the cuts are the state's, and those of no other training.
        cuts = state.cuts if state is not None and state.placement[0] != seating.placement[0] else None
        keep = bool(config.get("xgboost.resident")) and cuts is None and not sets.gpus
        held = residency.begin(seating.ranks, keep=keep)
        return [
            MatricesSpec(
                each=tuple(
                    matrix.spec(worker, categories, key, token)
                    for matrix, key, token in zip(sets.each, keys, residency.tokens or repeat(None))
                ),
                max_bin=sets.max_bin,
                quantiles=sets.by_quantiles(),
                cuts=cuts,
                resident=any(key for keys in held for key in keys),
            )
            for worker, keys in zip(seating.ranks, held)
        ]
