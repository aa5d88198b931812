"""A feed's folder becomes a dataset, by TensorFlow operations alone.

Nothing of the folder is looked at when a dataset is built: its graph reads the number of chunks and rows where and
when it runs. So one graph, traced by a coordinator, serves every parameter-server worker, each with its own rows.
"""

from __future__ import annotations

from typing import Any

from dask_tf.schema import Block, Schema

__all__ = ["dataset"]

#: A window of shuffled rows is this share of the data, between two bounds in bytes.
_WINDOW_SHARE, _LEAST_WINDOW, _MOST_WINDOW = 20, 4 * 2**20, 32 * 2**20
#: Chunks read at once, and batches ready before they are asked for.
_READERS, _READY = 2, 2


def dataset(
    folder: str,
    schema: Schema,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int | None = None,
    repeat: int | None = 1,
    drop_remainder: bool = False,
    window_bytes: int | None = None,
) -> Any:
    """Batches of the rows of a feed.

    Parameters
    ----------
    folder : str
        The feed's folder, as the process that consumes the dataset names it.
    schema : Schema
        What the feed is made of.
    batch_size : int
        Rows of a batch; the last one of a pass may be shorter.
    shuffle : bool
        Mix the rows, over partitions too: chunks come in a new order in every pass, and rows in a new
        order in every window of several chunks.
    seed : int, optional
        The same seed gives the same order in another process; each pass, and each iteration over the
        dataset, has an order of its own. None takes another seed for every dataset. As in all of TensorFlow,
        a seed set by ``tf.random.set_seed`` counts as well.
    repeat : int or None
        Passes over the rows; None for ever, unless there are no rows.
    drop_remainder : bool
        Leave out the short batch.
    window_bytes : int, optional
        Size of a window: more mixes better, and three times as much memory is used for a moment. By default
        a twentieth of the rows in this folder, and 4 to 32 MiB.

    Returns
    -------
    tf.data.Dataset
        Its elements are what Keras takes: of an array a tensor (batch, *shape of a row), of a series a tensor
        (batch,), of a frame a dict of tensors (batch,) by column; a tuple of these where the feed has several.

    Raises
    ------
    ValueError
        If `batch_size` or `window_bytes` is less than 1, or `repeat` negative.

    Examples
    --------
    >>> dataset("/proc/self/fd/9/train", schema, 1024, shuffle=True, seed=7)  # doctest: +SKIP
    """
    import tensorflow as tf

    for name, value, least in (("batch_size", batch_size, 1), ("window_bytes", window_bytes, 1), ("repeat", repeat, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; {least} or more is wanted")

    def batches(rows: Any, seed: Any) -> Any:
        """One pass."""
        if not shuffle:
            order = tf.range(tf.size(rows, out_type=tf.int64))
            return _chunks(folder, schema, order, rows).rebatch(batch_size, drop_remainder)
        order_seed, windows_seed = tf.unstack(tf.random.split(seed, 2))
        order = _permutation(tf.size(rows, out_type=tf.int64), order_seed)
        windows = _chunks(folder, schema, order, rows).rebatch(_window_rows(schema, rows, window_bytes))
        return _mixed(windows, windows_seed).rebatch(batch_size, drop_remainder)

    def passes(number: Any) -> Any:
        """All passes of one iteration over the dataset."""
        rows = tf.io.decode_raw(tf.io.read_file(f"{folder}/rows"), tf.int64)
        endless = tf.constant(tf.int64.max if repeat is None else repeat, tf.int64)
        count = tf.where(tf.reduce_sum(rows) > 0, endless, tf.zeros_like(endless))
        seeds = tf.data.Dataset.range(count).map(lambda number_of_pass: tf.stack([number, number_of_pass]))
        return seeds.flat_map(lambda seed: batches(rows, seed))

    numbers = tf.data.Dataset.random(seed, rerandomize_each_iteration=True).take(1)
    elements = numbers.flat_map(passes).map(lambda *blocks: _element(schema, blocks))
    return elements.prefetch(_READY)


def _chunks(folder: str, schema: Schema, order: Any, rows: Any) -> Any:
    """The blocks of each chunk, in an order."""
    import tensorflow as tf

    shapes = {held.columns[0].block: held.shape for held in schema.collections if held.kind == "array"}

    def read(chunk: Any) -> tuple[Any, ...]:
        name = tf.strings.join([folder, "/", tf.strings.as_string(chunk), "."])
        return tuple(
            tf.reshape(
                _decoded(tf.io.read_file(tf.strings.join([name, str(number)])), block),
                [rows[chunk], *shapes.get(number, (block.width,))],
            )
            for number, block in enumerate(schema.blocks)
        )

    return tf.data.Dataset.from_tensor_slices(order).map(read, num_parallel_calls=_READERS, deterministic=True)


def _decoded(raw: Any, block: Block) -> Any:
    import tensorflow as tf

    # The operation knows no unsigned integers of these sizes.
    signed = {"uint32": tf.int32, "uint64": tf.int64}
    if block.dtype in signed:
        return tf.bitcast(tf.io.decode_raw(raw, signed[block.dtype]), block.dtype)
    return tf.io.decode_raw(raw, tf.dtypes.as_dtype(block.dtype))


def _window_rows(schema: Schema, rows: Any, window_bytes: int | None) -> Any:
    """Rows of a window of shuffled rows."""
    import tensorflow as tf

    row_bytes = max(1, schema.row_bytes)
    if window_bytes is not None:
        return tf.constant(max(1, window_bytes // row_bytes), tf.int64)
    share = tf.reduce_sum(rows) // _WINDOW_SHARE
    return tf.clip_by_value(share, max(1, _LEAST_WINDOW // row_bytes), max(1, _MOST_WINDOW // row_bytes))


def _mixed(windows: Any, seed: Any) -> Any:
    """Each window with its rows in a random order."""
    import tensorflow as tf

    def mix(number: Any, blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        order = _permutation(tf.shape(blocks[0], out_type=tf.int64)[0], tf.random.fold_in(seed, number))
        return tuple(tf.gather(block, order) for block in blocks)

    # The next window is made while the batches of this one are taken.
    return windows.enumerate().map(mix).prefetch(1)


def _permutation(size: Any, seed: Any) -> Any:
    import tensorflow as tf

    return tf.random.experimental.stateless_shuffle(tf.range(size), seed)


def _element(schema: Schema, blocks: tuple[Any, ...]) -> Any:
    """Blocks of rows, put into the form that Keras takes."""
    import tensorflow as tf

    element = []
    for held in schema.collections:
        if held.kind == "array":
            element.append(blocks[held.columns[0].block])
            continue
        columns = {number: tf.unstack(blocks[number], axis=1) for number in {c.block for c in held.columns}}
        by_name = {column.name: columns[column.block][column.at] for column in held.columns}
        element.append(by_name if held.kind == "frame" else by_name[held.role])
    return element[0] if len(element) == 1 else tuple(element)
