"""How the collections of a call become what a model takes: nested as they were given, columns by input or side by side.

In a feed each collection has a role, "X" or "X['city']"; a `Layout` says which
roles make the inputs, the targets and the weights, and makes them of a batch's
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_tf.schema import Collection, Schema

__all__ = ["Layout", "flatten", "nested"]


def flatten(role: str, given: Any) -> dict[str, Any]:
    """The collections in a tuple, list or dict of them, or one alone, by role.

    >>> flatten("X", {"a": 1, "b": 2})
    {"X['a']": 1, "X['b']": 2}
    """
    if isinstance(given, Mapping):
        return {key: value for name, each in given.items() for key, value in flatten(f"{role}[{name!r}]", each).items()}
    if isinstance(given, tuple | list):
        return {key: value for at, each in enumerate(given) for key, value in flatten(f"{role}[{at}]", each).items()}
    return {role: given}


def nested(role: str, given: Any) -> Any:
    """What `flatten` was given, with roles in place of collections.

    >>> nested("y", (1, 2))
    ('y[0]', 'y[1]')
    """
    if isinstance(given, Mapping):
        return {name: nested(f"{role}[{name!r}]", each) for name, each in given.items()}
    if isinstance(given, tuple | list):
        return tuple(nested(f"{role}[{at}]", each) for at, each in enumerate(given))
    return role


@dataclass(frozen=True)
class Layout:
    """What a model's batch is made of.

    Attributes
    ----------
    x, y : nested roles, or None
    weight : nested roles, or None
        Of the sample weights.
    matrices : frozenset of str
        Roles of dataframes whose columns come side by side, not by name.
    inputs : tuple of str or None
        Those that a model takes as a dict, which gets no others: Keras would take them by their order.
    """

    x: Any
    y: Any = None
    weight: Any = None
    matrices: frozenset[str] = frozenset()
    inputs: tuple[str, ...] | None = None

    def element(self, schema: Schema, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        """``(x,)``, ``(x, y)`` or ``(x, y, weight)`` of the blocks of some rows, in NumPy arrays."""
        by_role = {held.role: held for held in schema.collections}

        def value(role: str) -> Any:
            return self._value(by_role[role], blocks)

        x = _mapped(value, self.x)
        if self.inputs is not None and isinstance(x, dict):
            x = {name: x[name] for name in self.inputs if name in x}
        element = [x]
        if self.y is not None:
            element.append(_mapped(value, self.y))
        if self.weight is not None:
            element.append(_mapped(value, self.weight))
        return tuple(element)

    def _value(self, held: Collection, blocks: tuple[Any, ...]) -> Any:
        if held.kind == "array":
            block = blocks[held.columns[0].block]
            return np.asarray(block).reshape(len(block), *held.shape)
        columns = {column.name: np.asarray(blocks[column.block][:, column.at]) for column in held.columns}
        if held.kind == "series":
            return columns[held.role]
        if held.role not in self.matrices:
            return columns
        numbers = {column.block for column in held.columns}
        if len(numbers) == 1:  # of one dtype, they lie side by side
            return np.asarray(blocks[numbers.pop()])
        return np.stack(list(columns.values()), axis=1)


def _mapped(function: Callable[[str], Any], roles: Any) -> Any:
    if isinstance(roles, dict):
        return {name: _mapped(function, each) for name, each in roles.items()}
    if isinstance(roles, tuple):
        return tuple(_mapped(function, each) for each in roles)
    return function(roles)
