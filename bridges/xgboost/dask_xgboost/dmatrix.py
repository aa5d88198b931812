"""The data of a training, placed on the workers once and used as often as wanted."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dask.core import flatten
from distributed import Client, Worker

from dask_bridges import clients, config, partitions, placement
from dask_bridges.errors import DataError, PlacementError
from dask_xgboost import checks, external, grouping
from dask_xgboost.blocks import FIELDS, BlockInfo, inspect, union_of_categories
from dask_xgboost.resident import Residents

__all__ = ["DMatrix", "MatrixOptions", "MatrixSpec", "place", "prepare", "replace"]

#: Seconds between looks at whether tasks wait for workers that are gone.
_LOOK_AGAIN = 1.0

PACKAGES = ("dask_bridges", "dask_xgboost", "xgboost")


@dataclass(frozen=True)
class MatrixOptions:
    """What belongs to a matrix as a whole; see `DMatrix`."""

    feature_weights: Any = None
    feature_names: Sequence[str] | None = None
    feature_types: Sequence[str] | None = None
    missing: float = float("nan")
    enable_categorical: bool = True
    external_memory: bool | str = False


@dataclass(frozen=True)
class MatrixSpec:
    """What one rank needs to build its part of a matrix.

    Attributes
    ----------
    keys : tuple
        Of the parts in the worker's store, in order; for a child process, `Inputs` of one part each.
    columns : tuple of (str, str)
        Fields that are columns of X.
    categories : dict
        The categories all partitions agree on, by column.
    num_features : int
    feature_names, feature_types : list of str or None
    options : MatrixOptions
    held : str or None
        Key of what was built of it before, see `resident`.
    token : str or None
        Under which it is left to the client if it is built.
    released : bool
        Whether the parts need not be there.
    """

    keys: tuple[Any, ...]
    columns: tuple[tuple[str, str], ...]
    categories: dict[str, Any]
    num_features: int
    feature_names: list[str] | None
    feature_types: list[str] | None
    options: MatrixOptions
    held: str | None = None
    token: str | None = None
    released: bool = False

    def there(self, worker: Worker) -> bool:
        """Whether the parts are there to build it from."""
        return not self.released and all(key in worker.data for key in self.keys)


class DMatrix:
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
    >>> X, y = da.random.random((1000, 4), chunks=(250, 4)), da.ones(1000, chunks=250)
    >>> dtrain = DMatrix(client, X, y)                       # doctest: +SKIP
    >>> train(client, {}, dtrain, num_boost_round=5)         # doctest: +SKIP
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
        values = (_label(y, label), weight, base_margin, qid, label_lower_bound, label_upper_bound)
        disk = external.checked(external_memory)
        options = MatrixOptions(feature_weights, feature_names, feature_types, missing, enable_categorical, disk)
        self._define(client, X, dict(zip(FIELDS, values)), options, role="X")
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
        self.client, self.source, self.role, self.options = client, X, role, options
        given = {name: value for name, value in fields.items() if value is not None}
        self.columns = {name: value for name, value in given.items() if isinstance(value, str)}
        for name, column in self.columns.items():
            _check_column_name(X, role, name, column)
        self.features = _features_meta(X, role, list(self.columns.values()))
        if not {"label", "label_lower_bound"} & set(given):
            raise DataError(
                f"{role} has no labels: pass y (a collection, or the name of a column of the dataframe), "
                "or label=, or label_lower_bound= and label_upper_bound="
            )
        self.feature_names, self.feature_types = self._name_features(options)
        others = {name: value for name, value in given.items() if name not in self.columns}
        for name, column in self.columns.items():
            checks.check_field(f"{name}={column!r}", X._meta[column])
        for name, value in others.items():
            checks.check_width(name, value)
            if partitions.is_frame(value):
                checks.check_field(name, value._meta)
        self._collections = {"X": X, **others}
        self.release = True
        self.residents = Residents()
        self.among: frozenset[str] = frozenset()  # the workers that it was spread over, with those that got nothing
        self._prepared: partitions.Prepared | None = None
        self._loaded: partitions.Partitions | None = None

    def _name_features(self, options: MatrixOptions) -> tuple[list[str] | None, list[str] | None]:
        for name in ("feature_names", "feature_types", "feature_weights"):
            given = getattr(options, name)
            if given is not None and len(given) != self.num_features:
                raise DataError(f"{name} has {len(given)} entries for the {self.num_features} features of {self.role}")
        if not partitions.is_frame(self.source):
            checks.check_array(self.role, self.source.dtype)
            names, types = options.feature_names, options.feature_types
            return None if names is None else [str(name) for name in names], None if types is None else list(types)
        checks.check_columns(self.role, self.features)
        if self.role == "X" and (options.feature_names is not None or options.feature_types is not None):
            raise DataError("X is a dataframe, whose columns have names and types: rename or convert those")
        if not options.enable_categorical:
            _refuse_categoricals(self.features)
        return [str(name) for name in self.features.columns], None

    @property
    def num_features(self) -> int:
        """Number of feature columns."""
        return int(self.features.shape[1])

    def has(self, field: str) -> bool:
        """Whether the field ("weight", "qid") was given."""
        return field in self.columns or field in self.parts.roles

    def labels(self) -> Any:
        """The collection of the labels."""
        column = self.columns.get("label")
        return self._collections["label"] if column is None else self._collections["X"][column]

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
    new = [matrix for matrix in matrices if matrix._loaded is None]
    for matrix, prepared in zip(new, partitions.prepare_all(client, [matrix._collections for matrix in new])):
        matrix._prepared = prepared


async def place(client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None) -> None:
    """Compute and check the partitions of prepared matrices in one go; those that are placed stay as they are."""
    new = [matrix for matrix in matrices if matrix._loaded is None]
    if not new:
        return
    names = [info.address for info in await placement.usable_workers(client, workers)]
    await placement.check_packages(client, names, PACKAGES, remedy=' ("dask-bridges[xgboost]")')
    for matrix, loaded in zip(new, await _loaded(client, new, workers and names)):
        matrix._loaded = loaded
        matrix._check()


async def replace(client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None) -> None:
    """Compute again what was lost of placed matrices; what workers still have is used.

    Parameters
    ----------
    client : Client
    matrices : sequence of DMatrix
    workers : sequence of str, optional
        Addresses where it may be computed.

    Raises
    ------
    PlacementError
        If some of it is bound to workers that are gone.
    """
    hurt = []
    for matrix in matrices:
        if lost := await matrix.parts.lost(client):
            for part in lost:  # those that were moved would wait for the worker that is gone
                matrix.parts.futures[part].release()
            hurt.append(matrix)
    if not hurt:
        return
    loading = asyncio.ensure_future(_loaded(client, hurt, workers))
    try:
        await _until(loading, client, _keys(hurt))
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    for matrix, loaded in zip(hurt, loading.result()):
        loaded.split(client, len(matrix.parts.filled()))
        matrix._loaded = loaded


async def _until(loading: asyncio.Future[Any], client: Client, keys: list[Any]) -> None:
    """Wait, but not for tasks that wait for a worker that is gone."""
    patience, stuck_since = config.seconds("worker-return-timeout"), time.monotonic()
    while not (await asyncio.wait({loading}, timeout=_LOOK_AGAIN))[0]:
        states = await client.scheduler.get_task_status(keys=keys)
        stuck = [key for key, state in states.items() if state == "no-worker"]
        if not stuck:
            stuck_since = time.monotonic()
        elif time.monotonic() - stuck_since > patience:
            raise PlacementError(
                f"lost data cannot be computed again: {len(stuck)} tasks, such as {stuck[0]}, may only run on "
                "workers that are gone. Persist without workers=, or with allow_other_workers=True"
            )


def _keys(matrices: Sequence[DMatrix]) -> list[Any]:
    """Of all that may have to be computed, persisted blocks included."""
    keys: dict[Any, None] = {}
    for matrix in matrices:
        assert matrix._prepared is not None
        keys.update(dict.fromkeys(matrix._prepared.graph))
        for collection in matrix._prepared.aligned.values():
            keys.update(dict.fromkeys(flatten(collection.__dask_keys__())))
    return list(keys)


async def _loaded(
    client: Client, matrices: Sequence[DMatrix], workers: Sequence[str] | None
) -> list[partitions.Partitions]:
    sets = []
    for matrix in matrices:
        assert matrix._prepared is not None
        sets.append((matrix._prepared, functools.partial(inspect, columns=tuple(matrix.columns.items()))))
    loaded = await partitions.load_all(client, sets, workers=workers) if sets else []
    return [await grouping.together(client, parts, matrix.columns, workers) for parts, matrix in zip(loaded, matrices)]


def _label(y: Any, label: Any) -> Any:
    if isinstance(y, (int, np.integer)) and not isinstance(y, bool):
        raise DataError(f"y={y} is a number, not labels; for the number of rounds pass num_boost_round={y}")
    if y is not None and label is not None:
        raise DataError("y and label are the same thing: pass one of them")
    return label if y is None else y


def _check_column_name(X: Any, role: str, name: str, column: str) -> None:
    if not hasattr(X, "columns"):
        raise DataError(
            f"{name}={column!r} names a column, but {role} is not a dataframe: pass the values as a collection"
        )
    if column not in list(X.columns):
        raise DataError(f"{name}={column!r} is not a column of {role}; it has {list(X.columns)}")


def _features_meta(X: Any, role: str, fields: list[str]) -> Any:
    """An empty frame with the feature columns, or the array itself."""
    if partitions.is_frame(X):
        if not hasattr(X, "columns") or X.ndim != 2:
            raise DataError(f"{role} is a series; for a single feature pass {role}.to_frame()")
        return X._meta.drop(columns=list(dict.fromkeys(fields)))
    if partitions.is_array(X) and X.ndim != 2:
        raise DataError(f"{role} has {X.ndim} dimensions; rows and features, so two, are wanted")
    if not partitions.is_array(X):
        raise DataError(
            f"{role} is a {type(X).__module__.split('.')[0]} {type(X).__name__}, not a Dask collection: make it one "
            "with dask.array.from_array or dask.dataframe.from_pandas"
        )
    return X


def _refuse_categoricals(meta: Any) -> None:
    names = [name for name, dtype in meta.dtypes.items() if str(dtype) == "category"]
    if names:
        raise DataError(f"columns {names} are categorical and enable_categorical is False; encode them, or allow it")
