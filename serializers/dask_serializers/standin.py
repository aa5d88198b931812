"""What travels in place of an object that cannot move, and raises why when it is used."""

from __future__ import annotations

from typing import Any, NoReturn

from dask_serializers.pages import see

__all__ = ["CannotMove", "StandIn"]


class CannotMove(TypeError):  # noqa: N818 - what a user reads in a traceback
    """A model could not leave its process, or could not be rebuilt in this one.

    The message names the object, the cause and the remedy. It is raised by the result's first use on a worker, and
    by ``Future.result`` and ``Client.gather`` on a client.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(see(type(self)))


class StandIn:
    """Holds the place of an object that could not move; any use of it raises :class:`CannotMove`.

    A serializer that raises makes Dask try the same transfer again for ever, so ours hand over this.

    Parameters
    ----------
    reason : str
        What the exception says.
    header : dict, optional
        With `frames`: the object as it arrived. It is passed on like this, so that a process which can rebuild it
        still gets the object.
    frames : sequence of bytes-like, optional
    """

    def __init__(self, reason: str, header: dict[str, Any] | None = None, frames: Any = ()) -> None:
        self.__dict__.update(_reason=reason, _header=header, _frames=list(frames))

    def _fail(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CannotMove(self._reason)

    def __getattr__(self, name: str) -> Any:
        # Dask and Python ask any object for names of this kind; that is not a use.
        if name.startswith("_"):
            raise AttributeError(name)
        self._fail()

    def __repr__(self) -> str:
        return f"<StandIn: {self._reason}>"

    __setattr__ = __call__ = __iter__ = __len__ = __getitem__ = __array__ = __bool__ = __contains__ = _fail

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        from dask_serializers.parcel import arrive_nested, as_pickled

        header, frames = as_sent(self)
        return arrive_nested, (header, *as_pickled(frames, int(protocol)))


def as_sent(standin: StandIn) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames of what `standin` stands for, or else of itself."""
    from dask_serializers.parcel import failed

    held = vars(standin)
    return (held["_header"], held["_frames"]) if held["_header"] else failed(held["_reason"])
