"""The matrices of a training, and what has to be the same in all of them: categories, and the way of binning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dask.base import tokenize

from dask_xgboost.dmatrix import DMatrix

__all__ = ["Datasets"]

#: From so many rows on, finding quantiles takes less time than XGBoost's sketch; of sparse ones it seldom does: a
#: column of a block costs some 0.1 ms however few values it has, and the sketch some 30 ns a value.
_MANY_ROWS = 100_000


@dataclass(frozen=True)
class Datasets:
    """The training set and the evaluation sets.

    Attributes
    ----------
    matrix : DMatrix
        The training set.
    evals : sequence of (DMatrix, str)
    max_bin : int
    cuts : str
        See `train`.
    gpus : bool
        Whether GPUs train.
    """

    matrix: DMatrix
    evals: Sequence[tuple[DMatrix, str]]
    max_bin: int
    cuts: str
    gpus: bool

    @property
    def each(self) -> list[DMatrix]:
        """The training matrix, and those of the evaluation sets, each once."""
        return list({id(matrix): matrix for matrix in (self.matrix, *(matrix for matrix, _ in self.evals))}.values())

    @property
    def numbered_evals(self) -> tuple[tuple[int, str], ...]:
        """The place in `each`, and the name, of each evaluation set."""
        numbers = {id(matrix): number for number, matrix in enumerate(self.each)}
        return tuple((numbers[id(matrix)], name) for matrix, name in self.evals)

    def categories(self) -> dict[str, Any]:
        """Categories over the training and the evaluation sets, so that all are coded alike."""
        union = self.matrix.categories()
        for matrix, _ in self.evals:
            if matrix is not self.matrix:
                union = {
                    name: known if name not in (other := matrix.categories()) or other[name].isin(known).all()
                    else known.append(other[name].difference(known))
                    for name, known in union.items()
                }  # fmt: skip
        return union

    def by_quantiles(self) -> bool:
        """Whether the columns are cut at their quantiles, and not where XGBoost's sketch says."""
        if self.cuts == "auto":
            return not self.gpus and self.matrix.rows >= _MANY_ROWS and not self.matrix.sparse
        return self.cuts == "quantiles"

    def how(self, matrix: DMatrix, worker: str) -> str:
        """Tells what a worker's part of a matrix is built from, and how, from anything else."""
        binning = tokenize(self.max_bin, self.by_quantiles(), self.categories())
        return f"{binning} {matrix.parts.rows_by_part(worker)}"
