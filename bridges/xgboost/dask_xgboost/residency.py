"""What is binned of a training's matrices and stays on the workers: which of it is used, kept, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence

from distributed import Client

from dask_xgboost.datasets import Datasets
from dask_xgboost.ready import Agreed
from dask_xgboost.resident import TAKEN_WITHIN, disown

__all__ = ["Residency"]


class Residency:
    """What workers keep of the matrices of one training.

    Parameters
    ----------
    client : Client
    sets : Datasets
    """

    def __init__(self, client: Client, sets: Datasets) -> None:
        self._client, self._sets = client, sets
        #: Under which an attempt leaves what it builds, by matrix; empty where nothing is to stay.
        self.tokens: list[str] = []

    def complete(self, workers: Sequence[str]) -> bool:
        """Whether the ranks of before, on some of these workers, have all matrices, so that no partition is needed."""
        sets = self._sets
        if sets.gpus or not all(matrix.placed for matrix in sets.each) or sets.matrix.among != frozenset(workers):
            return False
        ranks = sets.matrix.parts.holding()
        return all(
            set(matrix.parts.holding()) <= set(ranks) and all(keys)
            for matrix, keys in zip(sets.each, zip(*(self._keys(worker) for worker in ranks)))
        )

    def begin(self, ranks: Sequence[str], *, keep: bool) -> list[list[str | None]]:
        """The keys of what each rank has, by matrix, for a new attempt; what is of no use to it is let go of."""
        self.tokens = [uuid.uuid4().hex for _ in self._sets.each] if keep else []
        for matrix in self._sets.each:
            matrix.residents.keep_only({w: self._sets.how(matrix, w) for w in ranks} if keep else {})
        return [self._keys(worker) for worker in ranks]

    async def taken(self, within: float = TAKEN_WITHIN) -> None:
        """Wait until the workers have taken what they are to keep, at most so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                for matrix in self._sets.each:
                    await matrix.residents.taken()

    def adopt(self, ranks: Sequence[str], agreed: Agreed | None) -> None:
        """Have the workers keep what an attempt has built; None where it is not known what that was."""
        for number, (matrix, token) in enumerate(zip(self._sets.each, self.tokens)):
            for rank, worker in enumerate(ranks):
                how = self._sets.how(matrix, worker)
                had = matrix.residents.key(worker, how) is not None if agreed is None else agreed.had[rank, number]
                if not had:
                    matrix.residents.adopt(self._client, worker, how, token)
        self.tokens = []

    async def disown(self, ranks: Sequence[str]) -> None:
        """Have the workers forget what an attempt has built."""
        await disown(self._client, ranks, self.tokens)

    def forget(self, ranks: Sequence[str], lacking: Sequence[tuple[int, int]]) -> None:
        """Let go of what is there no more: memory was short. `lacking` are numbers of ranks and matrices."""
        for rank, number in lacking:
            self._sets.each[number].residents.forget(ranks[rank])

    def _keys(self, worker: str) -> list[str | None]:
        return [matrix.residents.key(worker, self._sets.how(matrix, worker)) for matrix in self._sets.each]
