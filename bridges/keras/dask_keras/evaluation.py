"""`evaluate`: every partition where it is, metrics merged from their state."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from distributed import Client

from dask_bridges import clients, partitions
from dask_bridges.errors import DataError
from dask_bridges.placement import check_packages, usable_workers
from dask_bridges.shipping import sealed
from dask_keras import upstream
from dask_keras.inputs import Feed, cut, feed_of, length, targets_of
from dask_keras.kept import kept, pack
from dask_keras.signature import check_built, inputs_of
from dask_keras.synchronous import check_adds_up

__all__ = ["evaluate"]


@dataclass(frozen=True)
class Plan:
    """What every partition is evaluated with.

    Attributes
    ----------
    token : str
        Of the model.
    x, y, sample_weight : Feed or None
    batch_size : int
    """

    token: str
    x: Feed
    y: Feed | None
    sample_weight: Feed | None
    batch_size: int

    def fed(self, blocks: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of ``model.evaluate`` for one partition."""
        feeds = {"x": self.x, "y": self.y, "sample_weight": self.sample_weight}
        return {name: None if feed is None else feed(blocks) for name, feed in feeds.items()}


@dataclass(frozen=True)
class Tally:
    """What one partition adds.

    Attributes
    ----------
    rows : int
    state : tuple of ndarray
        The metrics' variables, in float64.
    example : dict
        One row, as arguments of ``model.evaluate``: metrics make their variables when they see data.
    """

    rows: int
    state: tuple[Any, ...]
    example: dict[str, Any]


def evaluate(
    client: Client | None,
    model: Any,
    X: Any,
    y: Any = None,
    *,
    batch_size: int = 32,
    sample_weight: Any = None,
    return_dict: bool = False,
    workers: str | Iterable[str] | None = None,
    timeout: float | None = None,
) -> Any:
    """Loss and metrics over all rows, as ``model.evaluate`` gives them for all rows in one process.

    Every partition is evaluated where it is; the states of loss and metrics are added up, in float64, and their
    results taken of the sums. The model here is not touched, nor are the running values of its metrics.

    Parameters
    ----------
    client : distributed.Client or None
        None for the current one. With an asynchronous client the call returns an awaitable.
    model : keras.Model
        Built and compiled.
    X : dask array, dataframe or series, or tuple or dict of them
        As for :func:`dask_keras.predict`.
    y : dask array, dataframe or series, or tuple or dict of them, or str, optional
        Targets, in the form ``model.evaluate`` takes them; a str names a column of the dataframe X.
    batch_size : int, default 32
        Batches end where partitions end.
    sample_weight : dask array or series, or tuple or dict of them, optional
    return_dict : bool, default False
        Whether results come by their names.
    workers : str or iterable of str, optional
        Addresses or names of those that may be used; all by default.
    timeout : float, optional
        Seconds to wait for a first worker (``dask-bridges.timeout``).

    Returns
    -------
    float, list of float or dict
        What ``model.evaluate`` returns.

    Raises
    ------
    DataError
        If the model is not built or not compiled, inputs do not match it, partitions do not match, there are no
        rows, or a metric's state cannot be added up.
    PlacementError
        If there is no worker, or one lacks Keras or has another version or backend.

    Notes
    -----
    Loss and Keras's own metrics are sums over rows, so how rows are batched does not matter. It does, as for
    ``model.evaluate`` with another batch size, for a loss with the reduction "mean_with_sample_weight" or a mask,
    for activity regularisation, and for layers that look at their whole batch.

    Examples
    --------
    >>> model.compile(loss="mse", metrics=["mae"])                            # doctest: +SKIP
    >>> dask_keras.evaluate(client, model, X, y, batch_size=256)              # doctest: +SKIP
    [0.25, 0.41]
    """
    client = clients.current(client)
    check_built(model)
    if not model.compiled:
        raise DataError(f"model {model.name!r} is not compiled: call model.compile(loss=..., metrics=...) first")
    if isinstance(y, str):
        X, y = _without(X, y)
    # Optimising may compute a little metadata, which an asynchronous client cannot do for us here.
    with dask.config.set(scheduler="synchronous") if getattr(client, "asynchronous", False) else nullcontext():
        result = _result(model, {"X": X, "y": y, "sample_weight": sample_weight}, batch_size, return_dict)
    return clients.call(client, _computed, client, result, workers, timeout)


def _result(model: Any, data: dict[str, Any], batch_size: int, return_dict: bool) -> Any:
    """A task for each partition, and one for what comes of them."""
    x, collections, _ = feed_of(model, data["X"], inputs_of(model), role="X")
    feeds: dict[str, Feed | None] = {}
    for role in ("y", "sample_weight"):
        feed, more = targets_of(role, data[role]) if data[role] is not None else (None, {})
        feeds[role] = None if feed is None else feed.moved(len(collections))
        collections |= more
    aligned = partitions.align(collections)
    packed = pack(model)
    plan = Plan(packed.token, x, **feeds, batch_size=batch_size)
    node, call = packed.node(), dask.delayed(sealed(tally, plan=plan), pure=True)
    parts = zip(*(np.ravel(each.to_delayed()) for each in aligned.values()))
    tallies = [call(*blocks, model=node) for blocks in parts]
    return dask.delayed(sealed(finish, token=packed.token, return_dict=return_dict), pure=True)(tallies, model=node)


def _without(X: Any, y: str) -> tuple[Any, Any]:
    if not partitions.is_frame(X) or y not in getattr(X, "columns", ()):
        raise DataError(f"y={y!r} names a column, and X is no dataframe that has one")
    return X.drop(columns=y), X[y]


async def _computed(client: Client, result: Any, workers: str | Iterable[str] | None, timeout: float | None) -> Any:
    there = [worker.address for worker in await usable_workers(client, workers, timeout)]
    await check_packages(client, there, ("dask_keras", "keras"), " (pip install 'dask-bridges[keras]')")
    future = client.compute(result, workers=None if workers is None else there)
    try:
        return await client.gather(future)
    finally:
        future.release()


# On the workers


def tally(*blocks: Any, model: bytes, plan: Plan) -> Tally | None:
    """Evaluate one partition; None if it has no rows."""
    rows = {int(block.shape[0]) for block in blocks}
    if len(rows) > 1:
        raise DataError(f"blocks of one partition have {sorted(rows)} rows: X, y and weights do not match row for row")
    if not (total := rows.pop()):
        return None
    fed = plan.fed(blocks)
    here = kept(plan.token, model)
    with here.lock:
        states = [_state(here.model, _rows(fed, *piece), plan.batch_size) for piece in _pieces(plan, total)]
        check_adds_up(here.model)
    return Tally(total, tuple(map(sum, zip(*states))), _rows(fed, 0, 1))


def _rows(fed: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: None if values is None else cut(values, start, stop) for name, values in fed.items()}


def _pieces(plan: Plan, rows: int) -> list[tuple[int, int]]:
    """Rows that are evaluated together: with several losses, of batches of one length (see `_state`)."""
    whole = rows - rows % plan.batch_size
    if plan.y is None or len(plan.y.reads) == 1 or whole in (0, rows):
        return [(0, rows)]
    return [(0, whole), (whole, rows)]


def _state(model: Any, fed: dict[str, Any], batch_size: int) -> list[Any]:
    """The metrics' variables after these rows.

    The loss of each output counts batches where Keras does not know their length while it compiles (TensorFlow),
    and rows elsewhere. Of batches of one length the mean is the same: it is made to count rows.
    """
    model.evaluate(**fed, batch_size=batch_size, verbose=0)
    rows = length(fed["x"])
    weight = {
        id(variable): rows / max(float(_numbers(loss.count)), 1.0)
        for loss in upstream.output_losses(model)
        for variable in loss.variables
    }
    return [_numbers(variable) * weight.get(id(variable), 1.0) for variable in model.metrics_variables]


def _numbers(variable: Any) -> Any:
    import keras

    return np.array(keras.ops.convert_to_numpy(variable.value), dtype="float64")


def finish(tallies: list[Tally | None], *, model: bytes, token: str, return_dict: bool) -> Any:
    """The results of all partitions together."""
    filled = [each for each in tallies if each is not None]
    if not filled:
        raise DataError("X has no rows: there is nothing to evaluate")
    here = kept(token, model)
    with here.lock:
        said = here.model.evaluate(**filled[0].example, verbose=0, return_dict=True)
        for variable, *values in zip(here.model.metrics_variables, *(each.state for each in filled)):
            variable.assign(np.sum(values, axis=0).astype(str(variable.dtype)))
        logs = {name: _plain(value) for name, value in here.model.get_metrics_result().items()}
        if logs.keys() != said.keys():
            raise DataError(
                f"test_step of model {here.model.name!r} gives {sorted(said)}, and its metrics are {sorted(logs)}: "
                "only what metrics keep can be merged. Keep it in metrics, and return get_metrics_result()"
            )
        # Keras sorts the dict, and has an order of its own for the list.
        found = dict(sorted(logs.items())) if return_dict else upstream.in_order(here.model, logs)
        here.model.reset_metrics()
    return found


def _plain(value: Any) -> Any:
    """A number as a float, as Keras gives it; others as numpy arrays."""
    import keras

    array = keras.ops.convert_to_numpy(value)
    return float(array) if array.ndim == 0 else array
