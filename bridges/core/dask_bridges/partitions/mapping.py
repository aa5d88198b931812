"""A function of the rows of arrays as a lazy array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dask_bridges.shipping import sealed

__all__ = ["map_rows"]


def map_rows(
    function: sealed, arrays: Sequence[Any], shape: tuple[float, ...], dtype: Any, *, name: str, **keywords: Any
) -> Any:
    """`function` of every block of rows, as one layer on the graph.

    `dask.array.blockwise` for arrays that share their rows and no other axis. It
    joins the blocks of the axes that end here by copying them, even where there
    is one; here the blocks themselves reach the function.

    Parameters
    ----------
    function : sealed
        Is called with a block of each array.
    arrays : sequence of dask array
        As `align` returns them: the same chunks of rows, no chunks over other axes.
    shape : tuple of float
        Of a row of the result; nan where only the data tells.
    dtype : numpy.dtype
        Of the result.
    name : str
        Of the result.
    keywords
        Further arguments of `function`; lazy ones are computed once.

    Returns
    -------
    dask array
        Shape ``(rows, *shape)``, the chunks of rows of `arrays`.

    Examples
    --------
    >>> import dask.array as da
    >>> def total(block):
    ...     return block.sum(axis=1)
    >>> map_rows(sealed(total), [da.ones((4, 2), chunks=(2, 2))], (), "float64", name="total").compute()
    array([2., 2., 2., 2.])
    """
    import dask.array as da

    axes = range(1, 1 + len(shape))
    return da.blockwise(
        sealed(_call, function.call),
        (0, *axes),
        *(item for number, array in enumerate(arrays) for item in (array, _axes(number, array.ndim))),
        **keywords,
        new_axes=dict(zip(axes, shape)),
        dtype=dtype,
        meta=np.empty((0,) * (1 + len(shape)), dtype),
        name=name,
    )


def _axes(number: int, ndim: int) -> tuple[int, ...]:
    """Rows are axis 0 of all arrays; no other axis is shared."""
    return (0, *(-10 * number - axis for axis in range(1, ndim)))


def _call(function: Callable[..., Any], *blocks: Any, **keywords: Any) -> Any:
    return function(*map(_only, blocks), **keywords)


def _only(block: Any) -> Any:
    """The one block in lists of lists, of which there is one for each axis that ends here."""
    while isinstance(block, list):
        (block,) = block
    return block
