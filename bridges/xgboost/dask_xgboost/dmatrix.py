"""The data of a training, placed on the workers once and used as often as wanted."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Sequence
from typing import Any

from distributed import Client

from dask_bridges import clients, partitions, placement
from dask_bridges.errors import DataError
from dask_xgboost import external, grouping
from dask_xgboost.blocks import FIELDS, BlockInfo, inspect, union_of_categories
from dask_xgboost.definition import Definition, label_of
from dask_xgboost.matrixspec import MatrixOptions, MatrixSpec
from dask_xgboost.resident import Residents

__all__ = ["PACKAGES", "DMatrix", "load", "place", "prepare"]

PACKAGES = ("dask_bridges", "dask_xgboost", "xgboost")


class DMatrix(Definition):
    """A distributed matrix: features, labels and what else belongs to each row.

    Made once, it can be trained on and evaluated on many times: its partitions
    are computed, checked and spread over the workers when it is made, and binned
    by the first training; the next ones find them binned. All of it stays there as
    long as the matrix lives, but for what is binned where a worker is short of
    memory, which is binned again.

    Parameters
    ----------
    client : distributed.Client or None
        None for the current one. With an asynchronous client, ``await`` the matrix.
    X : dask array or dask dataframe
        Shape (rows, features); chunks are numpy arrays or scipy.sparse CSR
        matrices. Columns of a dataframe are numbers, booleans or categoricals.
    y : dask array, series, or str, optional
        The labels, or the column of `X` that holds them. The same as `label`.
    label, weight, base_margin, qid, label_lower_bound, label_upper_bound : optional
        As in `xgboost.DMatrix`: collections with as many rows as `X`, or names of
        columns of `X`. Query groups (`qid`) that partitions cut are brought together.
    feature_weights : array_like, optional
        One weight a feature, for column sampling.
    feature_names, feature_types : sequence of str, optional
        For arrays; a dataframe has its own.
    missing : float, default nan
        The value that stands for a missing one.
    enable_categorical : bool, default True
        Whether categorical columns are trained on as such.
    release : bool, default False
        Let go of the partitions once a training has binned them. They are computed again where a worker is lost,
        memory is short, or a training wants other bins.
    external_memory : bool or path, default False
        Keep what is binned on the workers' disks, for data that are larger than their memory: True for the local
        directory of each worker, or the absolute path of a folder on each. Not for GPUs.

    Raises
    ------
    DataError
        If the collections do not match, a partition cannot be computed, or a
        column is of no use to XGBoost.
    PlacementError
        If there are no workers, or they lack XGBoost in the client's version.

    Examples
    --------
    >>> import dask.array as da
    >>> from distributed import Client
    >>> import dask_xgboost
    >>> X, y = da.random.random((1000, 4), chunks=(250, 4)), da.ones(1000, chunks=250)
    >>> with Client(processes=False, n_workers=1) as client:
    ...     dtrain = dask_xgboost.DMatrix(client, X, y)
    ...     dask_xgboost.train(client, {}, dtrain, num_boost_round=5).num_boosted_rounds()
    5
    """

    def __init__(
        self,
        client: Client | None,
        X: Any,
        y: Any = None,
        *,
        label: Any = None,
        weight: Any = None,
        base_margin: Any = None,
        qid: Any = None,
        label_lower_bound: Any = None,
        label_upper_bound: Any = None,
        feature_weights: Any = None,
        feature_names: Sequence[str] | None = None,
        feature_types: Sequence[str] | None = None,
        missing: float = float("nan"),
        enable_categorical: bool = True,
        release: bool = False,
        external_memory: bool | str | os.PathLike[str] = False,
    ) -> None:
        client = clients.current(client)
        values = (label_of(y, label), weight, base_margin, qid, label_lower_bound, label_upper_bound)
        disk = external.checked(external_memory)
        options = MatrixOptions(feature_weights, feature_names, feature_types, missing, enable_categorical, disk)
        self._define(client, X, dict(zip(FIELDS, values)), options, "X")
        self.release = release
        prepare(client, [self])
        if not client.asynchronous:
            clients.call(client, self.ready)

    @classmethod
    def unplaced(cls, client: Client, X: Any, fields: dict[str, Any], options: MatrixOptions, role: str) -> DMatrix:
        """A matrix that is checked and prepared, and computed when `ready` is awaited."""
        matrix = cls.__new__(cls)
        matrix._define(client, X, fields, options, role)
        return matrix

    def _define(self, client: Client, X: Any, fields: dict[str, Any], options: MatrixOptions, role: str) -> None:
        super().__init__(X, fields, options, role)
        self.client = client
        self.release = True
        self.residents = Residents()
        self.among: frozenset[str] = frozenset()  # the workers that it was spread over, with those that got nothing
        self._prepared: partitions.Prepared | None = None
        self._loaded: partitions.Partitions | None = None

    def has(self, field: str) -> bool:
        """Whether the field ("weight", "qid") was given."""
        return field in self.columns or field in self.parts.roles

    @property
    def placed(self) -> bool:
        """Whether the partitions are computed; they may be lost or let go of since."""
        return self._loaded is not None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.parts.rows)

    @property
    def parts(self) -> partitions.Partitions:
        """The partitions on the workers.

        Raises
        ------
        RuntimeError
            If the matrix is not awaited yet.
        """
        if self._loaded is None:
            raise RuntimeError("this DMatrix is not ready: with an asynchronous client, await it first")
        return self._loaded

    @property
    def infos(self) -> list[BlockInfo]:
        """What is known of each partition."""
        return [info.extra for info in self.parts.infos]

    def __await__(self) -> Generator[Any, None, DMatrix]:
        return self.ready().__await__()

    async def ready(self, workers: Sequence[str] | None = None) -> DMatrix:
        """Compute and check the partitions, unless that is done."""
        await place(self.client, [self], workers)
        return self

    @property
    def sparse(self) -> bool:
        """Whether some partition is a sparse matrix."""
        return any(info.sparse for info in self.infos)

    def _check(self) -> None:
        if not self.rows:
            raise DataError(f"{self.role} has no rows in any of its {len(self.parts.rows)} partitions")
        wanted = list(self.features.columns) if partitions.is_frame(self.source) else [self.num_features]
        for index, info in enumerate(self.infos):
            if list(info.columns) != wanted:
                raise DataError(f"partition {index} of {self.role} has columns {list(info.columns)}, not {wanted}")

    def categories(self) -> dict[str, Any]:
        """The categories of each categorical column, over all partitions.

        Partitions that agree keep their order; else the union is sorted, where it can be.
        """
        return union_of_categories(self.infos)

    async def place_like(self, ranks: Sequence[str], *, everywhere: bool) -> None:
        """Bring the partitions to the workers of a training; `everywhere` sees that each has rows.

        XGBoost cannot evaluate categorical columns on a rank that has none.
        """
        if everywhere and self.rows < len(ranks):
            raise DataError(
                f"{self.role} has {self.rows} rows for {len(ranks)} workers; with categorical columns each worker "
                "needs one: use more rows, or fewer workers (workers=[...])"
            )
        if everywhere:
            if self.has("qid") and len(self.parts.filled()) < len(ranks):
                raise DataError(
                    f"{self.role} has rows in {len(self.parts.filled())} partitions for {len(ranks)} workers; with "
                    "categorical columns and query groups, use at least one partition a worker"
                )
            self.parts.split(self.client, len(ranks))
        await self.parts.spread(self.client, ranks, everywhere=everywhere)

    def spec(
        self, worker: str, categories: dict[str, Any], held: str | None = None, token: str | None = None
    ) -> MatrixSpec:
        """What the rank on `worker` needs."""
        return MatrixSpec(
            keys=self.parts.keys_on(worker),
            columns=tuple(self.columns.items()),
            categories=categories,
            num_features=self.num_features,
            feature_names=self.feature_names,
            feature_types=self.feature_types,
            options=self.options,
            held=held,
            token=token,
            released=self.parts.released,
        )


def prepare(client: Client, matrices: Sequence[DMatrix]) -> None:
    """Align and optimise the collections of matrices that are not placed yet, in one graph, in the caller's thread.

    Raises
    ------
    DataError
        If the collections of a matrix do not match.
    """
    new = [matrix for matrix in matrices if not matrix.placed]
    for matrix, prepared in zip(new, partitions.prepare_all(client, [matrix.collections for matrix in new])):
        matrix._prepared = prepared


async def place(client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None) -> None:
    """Compute and check the partitions of prepared matrices in one go; those that are placed stay as they are."""
    new = [matrix for matrix in matrices if not matrix.placed]
    if not new:
        return
    names = [info.address for info in await placement.usable_workers(client, workers)]
    await placement.check_packages(client, names, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
    for matrix, loaded in zip(new, await load(client, new, workers and names)):
        matrix._loaded = loaded
        matrix._check()


async def load(
    client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None
) -> list[partitions.Partitions]:
    """The partitions of prepared matrices, computed, described, and with each query group in one of them."""
    sets = []
    for matrix in matrices:
        assert matrix._prepared is not None
        sets.append((matrix._prepared, functools.partial(inspect, columns=tuple(matrix.columns.items()))))
    loaded = await partitions.load_all(client, sets, workers=workers) if sets else []
    return [await grouping.together(client, parts, matrix.columns, workers) for parts, matrix in zip(loaded, matrices)]
