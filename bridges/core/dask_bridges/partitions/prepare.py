"""The one graph of the collections of a call, in which a task a partition brings its blocks together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
from dask._task_spec import Alias, TaskRef, convert_legacy_graph
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from distributed import Client, Future

from dask_bridges.partitions.blocks import join, pack
from dask_bridges.partitions.collections import align, is_array, is_frame
from dask_bridges.shipping import sealed, sealed_task

__all__ = ["Prepared", "prepare", "prepare_all"]


@dataclass(frozen=True)
class Prepared:
    """Aligned collections and the one graph that packs their partitions; nothing has run yet.

    Attributes
    ----------
    aligned : dict
        The collections, by role.
    graph : dict
        Low-level graph; the same one for all that were prepared together.
    keys : list
        Of the packed parts, by partition.
    """

    aligned: dict[str, Any]
    graph: dict[Any, Any]
    keys: list[Any]


def prepare(client: Client, collections: Mapping[str, Any]) -> Prepared:
    """Align the collections and build their graph, in the caller's thread.

    Parameters
    ----------
    client : Client
    collections : mapping of str to dask array or dataframe
        By role; the first one leads in alignment.

    Raises
    ------
    DataError
        If the collections cannot be aligned.
    """
    return prepare_all(client, [collections])[0]


def prepare_all(client: Client, sets: Sequence[Mapping[str, Any]]) -> list[Prepared]:
    """`prepare` several sets of collections, in one graph: what they share is read once.

    Parameters
    ----------
    client : Client
    sets : sequence of mapping
        Such as a training set and its evaluation sets; each is aligned by itself.

    Returns
    -------
    list of Prepared
        To be given to `load_all` together.
    """
    # Optimising may compute a little metadata, which an asynchronous client cannot do for us here.
    with dask.config.set(scheduler="synchronous") if client.asynchronous else contextlib.nullcontext():
        aligned = [align(collections) for collections in sets]
        graph, keys = _packed_graph(aligned)
        return [Prepared(collections, graph, keys_) for collections, keys_ in zip(aligned, keys)]


def _packed_graph(sets: Sequence[Mapping[str, Any]]) -> tuple[dict[Any, Any], list[list[Any]]]:
    """One graph in which a task a partition brings the blocks of a set's collections together; its keys by set.

    Frames are optimised as one expression and arrays as one graph, so that what
    they share is read once.
    """
    frames = [{role: c for role, c in collections.items() if is_frame(c)} for collections in sets]
    arrays = [{role: c for role, c in collections.items() if is_array(c)} for collections in sets]
    graph, of_frames = _frames_graph([some for some in frames if some])
    graph.update(_arrays_graph([array for some in arrays for array in some.values()]))
    keys = []
    for collections, some_frames, some_arrays in zip(sets, frames, arrays):
        packed = [of_frames.pop(0)] if some_frames else []
        if some_arrays:
            sources = packed + [list(flatten(array.__dask_keys__())) for array in some_arrays.values()]
            packed = [_join_all(graph, collections, bool(some_frames), tuple(some_arrays), sources)]
        keys.append(packed[0])
    return graph, keys


def _frames_graph(sets: Sequence[Mapping[str, Any]]) -> tuple[dict[Any, Any], list[list[Any]]]:
    """The graph whose tasks pack the frames of each set, and the tasks' keys by set."""
    if not sets:
        return {}, []
    import dask.dataframe as dd
    import pandas as pd

    meta = pd.Series([], dtype=object)
    packs = [
        dd.map_partitions(
            sealed(pack, tuple(frames)), *frames.values(), meta=meta, align_dataframes=False, enforce_metadata=False
        )
        for frames in sets
    ]
    # Not dask.optimize: it loses the order of a frame's partitions behind .loc (dask 2026.8). Several are not fused:
    # each would read for itself what they share.
    if len(packs) == 1:
        together = packs[0].optimize()
        keys = [list(flatten(together.__dask_keys__()))]
    else:
        together = dask.base.collections_to_expr(packs).optimize()
        keys = [list(flatten(some)) for some in together.__dask_keys__()]
    return _without_aliases(dict(together.__dask_graph__()), set(flatten(keys))), keys


def _without_aliases(graph: dict[Any, Any], wanted: set[Any]) -> dict[Any, Any]:
    """A graph without the names that Dask gives to what is persisted; each would run as a task.

    `dask._task_spec.resolve_aliases` leaves these, since what they stand for is not in the graph.
    """
    futures = {key: node for key, node in graph.items() if isinstance(node, Future)}
    nodes = convert_legacy_graph({key: node for key, node in graph.items() if key not in futures}, all_keys=graph)
    aliases = {key: node.target for key, node in nodes.items() if isinstance(node, Alias) and key not in wanted}
    for key in aliases:
        while aliases[key] in aliases:
            aliases[key] = aliases[aliases[key]]
    return {**futures, **{key: node.substitute(aliases) for key, node in nodes.items() if key not in aliases}}


def _arrays_graph(arrays: Sequence[Any]) -> dict[Any, Any]:
    """The graph of all blocks. Not dask.optimize: it reads the source of two arrays twice (dask 2026.8)."""
    if not arrays:
        return {}
    merged = HighLevelGraph.merge(*(array.__dask_graph__() for array in arrays))
    keys = [key for array in arrays for key in flatten(array.__dask_keys__())]
    return dict(arrays[0].__dask_optimize__(merged, keys))


def _join_all(
    graph: dict[Any, Any],
    collections: Mapping[str, Any],
    with_frames: bool,
    arrays: tuple[str, ...],
    sources: Sequence[Sequence[Any]],
) -> list[Any]:
    """Add the tasks that join the i-th blocks of all sources; their keys."""
    name = "dask-bridges-pack-" + dask.base.tokenize(*collections.values(), tuple(collections))
    keys = [(name, index) for index in range(len(sources[0]))]
    for index, key in enumerate(keys):
        # References, since a persisted block is no longer in the graph: the scheduler has it.
        blocks = tuple(TaskRef(source[index]) for source in sources)
        graph[key] = sealed_task(key, join, tuple(collections), with_frames, arrays, inputs=blocks)
    return keys
