"""Query groups that partitions cut, brought together on the workers: whole groups move, and nothing is sorted."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from dask._task_spec import TaskRef
from distributed import Client

from dask_bridges.partitions import Part, Partitions
from dask_bridges.partitions.blocks import describe
from dask_bridges.shipping import sealed_task
from dask_xgboost.blocks import BlockInfo, groups_of, inspect, recode, union_of_categories

__all__ = ["cut_groups", "together"]

#: Pieces that travel between partitions, at most: each is a task of the scheduler's.
MOST_PIECES = 50_000


@dataclass(frozen=True)
class _Moves:
    """Which groups leave a partition, sorted, and the partition that each of them goes to."""

    groups: Any
    targets: Any


def cut_groups(infos: Sequence[BlockInfo]) -> Any:
    """Ids of the query groups that lie in several partitions, sorted."""
    found = [info.groups for info in infos if info.groups is not None]
    if not found:
        return np.array([])
    groups, partitions = np.unique(np.concatenate(found), return_counts=True)
    return groups[partitions > 1]


async def together(
    client: Client, parts: Partitions, columns: Mapping[str, str], workers: Sequence[str] | None = None
) -> Partitions:
    """The partitions with each query group in one of them; the same ones where none is cut.

    A group that is cut goes to one of the partitions that have rows of it, by a hash of its id, so that the same
    rows come to the same partitions wherever they are. The others stay where they are. Its rows keep their order.

    Parameters
    ----------
    client : Client
    parts : Partitions
        Described by `inspect`.
    columns : mapping of str to str
        Fields that are columns of X.
    workers : sequence of str, optional
        Addresses where this may be done.
    """
    infos: list[BlockInfo] = [info.extra for info in parts.infos]
    cut = cut_groups(infos)
    if not len(cut):
        return parts
    graph, keys, looks = _graph(parts, _moves(infos, cut), dict(columns), union_of_categories(infos))
    restriction = {} if workers is None else {"workers": list(workers), "allow_other_workers": False}
    futures, described = client.get(graph, [keys, looks], sync=False, **restriction)
    return Partitions(parts.roles, list(await client.gather(described)), list(futures))


def _moves(infos: Sequence[BlockInfo], cut: Any) -> list[_Moves]:
    """What leaves each partition."""
    import pandas as pd

    hashes = pd.util.hash_array(cut)
    owners = [np.isin(cut, info.groups, assume_unique=True) for info in infos]
    shares = np.sum(owners, axis=0)
    chosen, passed = hashes % shares.astype("uint64"), np.zeros(len(cut), dtype="uint64")
    target = np.zeros(len(cut), dtype="int64")
    for partition, owned in enumerate(owners):  # the chosen one of those that have rows of the group
        target[owned & (passed == chosen)] = partition
        passed += owned
    pieces = sum(len(np.unique(target[owned])) for owned in owners)
    if pieces > MOST_PIECES:
        few = max(1, MOST_PIECES // len(infos))
        target = (hashes % np.uint64(few)).astype("int64") * len(infos) // few
    return [
        _Moves(cut[leaves], target[leaves])
        for partition, owned in enumerate(owners)
        for leaves in [owned & (target != partition)]
    ]


def _graph(
    parts: Partitions, moves: Sequence[_Moves], columns: dict[str, str], categories: dict[str, Any]
) -> tuple[dict[Any, Any], list[Any], list[Any]]:
    """Tasks that divide, pick and join; the keys of the new partitions, and of what is to know of them."""
    token = dask.base.tokenize([future.key for future in parts.futures], [(m.groups, m.targets) for m in moves])
    divided, picked, name, look = (f"dask-bridges-groups-{kind}-{token}" for kind in ("cut", "pick", "join", "look"))
    sources: list[list[Any]] = [[] for _ in moves]
    graph: dict[Any, Any] = {}
    for number, (future, leaving) in enumerate(zip(parts.futures, moves)):
        if not len(leaving.groups):
            sources[number].append(TaskRef(future.key))
            continue
        graph[divided, number] = sealed_task(
            (divided, number), _divide, columns, leaving, inputs=(TaskRef(future.key),)
        )
        for target in [number, *np.unique(leaving.targets).tolist()]:
            key = (picked, number, target)
            graph[key] = sealed_task(
                key, _pick, None if target == number else target, inputs=(TaskRef((divided, number)),)
            )
            sources[target].append(TaskRef(key))
    look_at = functools.partial(inspect, columns=tuple(columns.items()))
    for number, inputs in enumerate(sources):
        graph[name, number] = sealed_task((name, number), _join, categories, inputs=tuple(inputs))
        graph[look, number] = sealed_task((look, number), describe, look_at, inputs=(TaskRef((name, number)),))
    return graph, [(name, number) for number in range(len(moves))], [(look, number) for number in range(len(moves))]


# On the workers


def _divide(columns: Mapping[str, str], leaving: _Moves, part: Part) -> dict[int | None, Part]:
    """The rows that go to each partition; those that stay under None."""
    groups = groups_of(part, columns)
    places = np.minimum(np.searchsorted(leaving.groups, groups), len(leaving.groups) - 1)
    leaves = leaving.groups[places] == groups
    targets = leaving.targets[places]
    found: dict[int | None, Part] = {None: _rows(part, np.flatnonzero(~leaves))}
    for target in np.unique(targets[leaves]).tolist():
        found[target] = _rows(part, np.flatnonzero(leaves & (targets == target)))
    return found


def _rows(part: Part, rows: Any) -> Part:
    return {role: block.iloc[rows] if hasattr(block, "iloc") else block[rows] for role, block in part.items()}


def _pick(target: int | None, divided: dict[int | None, Part]) -> Part:
    return divided[target]


def _join(categories: Mapping[str, Any], *pieces: Part) -> Part:
    """One partition of pieces, which come in the order of the partitions they are from."""
    if len(pieces) == 1:
        return pieces[0]
    return {role: _stacked([piece[role] for piece in pieces], categories if role == "X" else {}) for role in pieces[0]}


def _stacked(blocks: list[Any], categories: Mapping[str, Any]) -> Any:
    if hasattr(blocks[0], "iloc"):
        import pandas as pd

        return pd.concat([recode(block, categories) if block.ndim == 2 else block for block in blocks])
    if hasattr(blocks[0], "indptr"):
        import scipy.sparse

        return scipy.sparse.vstack(blocks, format="csr")
    return np.concatenate(blocks)
