"""Where errors are explained: the one place that knows the address of the documentation."""

__all__ = ["TROUBLESHOOTING", "see"]

#: The page that has an entry for each class of error, below the documentation's address in ``pyproject.toml``.
TROUBLESHOOTING = "https://dask-bridges.readthedocs.io/page/troubleshooting.html"


def see(kind: type[BaseException], page: str = TROUBLESHOOTING) -> str:
    """What an error of this kind adds to its message.

    >>> from dask_serializers.pages import see
    >>> see(TypeError)
    'See https://dask-bridges.readthedocs.io/page/troubleshooting.html#typeerror'
    """
    return f"See {page}#{kind.__name__.lower()}"
