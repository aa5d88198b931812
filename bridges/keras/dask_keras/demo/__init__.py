"""Keras's part of ``dask bridges demo``: the flights once more, through embeddings and dense layers."""

__all__: list[str] = []
