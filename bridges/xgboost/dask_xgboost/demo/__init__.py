"""XGBoost's part of ``dask bridges demo``: which flights arrive late, learned by a cluster and by one process."""

__all__: list[str] = []
