"""Taking our place in Dask's dispatchers, in this process, and giving it back.

Nothing is imported here that Dask or a framework would have to be loaded for: this module runs while Dask is itself
half imported (entry point ``dask.sizeof``).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

import wrapt

__all__ = ["activate", "deactivate", "forget", "teach"]

#: Top-level module of a library -> our module that has ``teach()``, ``unteach()`` and ``rebuild(parcel)`` for it.
LIBRARIES = {
    "keras": "dask_serializers.keras",
    "tensorflow": "dask_serializers.tensorflow",
    "xgboost": "dask_serializers.xgboost",
}

logger = logging.getLogger(__name__)
_active = False
_hooked = False


def activate(*_: Any) -> None:
    """Make this process able to move models; no cluster needed. It imports no framework.

    Also the ``dask.sizeof`` entry point, which Dask calls with its dispatcher in every process that uses it.
    """
    global _active, _hooked
    if _active:
        return
    _active = True
    if _hooked:
        if "distributed.protocol" in sys.modules:
            _take_over()
        return
    _hooked = True
    # Dask may be half imported now, and registers hooks of its own at the end of that import; and Keras must be
    # taught when it is imported, since an object that merely holds a model asks no dispatcher for Keras.
    wrapt.register_post_import_hook(_when_imported(_take_over), "distributed.protocol")
    for library, ours in LIBRARIES.items():
        for name in (library, ours):
            wrapt.register_post_import_hook(_when_imported(partial(_teach, library)), name)


def _when_imported(act: Callable[[], None]) -> Callable[[Any], None]:
    def hook(module: Any) -> None:
        if _active:
            act()

    return hook


def _dispatchers() -> tuple[Any, Any, Any]:
    from dask.sizeof import sizeof
    from distributed.protocol.serialize import dask_deserialize, dask_serialize

    return dask_serialize, dask_deserialize, sizeof


def _take_over() -> None:
    """Put our hook in the place of distributed's, whose Keras serializer fails on Keras 3."""
    from distributed.protocol.serialize import dask_dumps, register_serialization_family

    from dask_serializers.parcel import arrive
    from dask_serializers.standin import StandIn, as_sent

    register_serialization_family("dask", dask_dumps, _loads)
    serialize, deserialize, _ = _dispatchers()
    for library in LIBRARIES:
        for dispatcher in (serialize, deserialize):
            dispatcher.register_lazy(library, partial(_teach, library))
        if _imported(library):
            _teach(library)
    serialize.register(StandIn, as_sent)
    deserialize.register(StandIn, arrive)


def _loads(header: dict[str, Any], frames: Any) -> Any:
    """Dask's own, but that our objects are rebuilt without their type, which this process may not have."""
    from distributed.protocol.serialize import dask_loads

    from dask_serializers.parcel import arrive, is_ours

    return arrive(header["sub-header"], frames) if is_ours(header["sub-header"]) else dask_loads(header, frames)


def _teach(library: str) -> None:
    if not _active or "distributed.protocol" not in sys.modules:
        return
    try:
        ours = import_module(LIBRARIES[library])
        if hasattr(ours, "teach"):  # else it is what imports the library just now, and has a hook of its own
            ours.teach(*_dispatchers())
    except Exception:
        # This runs inside the user's own `import keras`: a version we do not know must not break that.
        logger.warning("Objects of this version of %s cannot be moved by dask-bridges", library, exc_info=True)


def _imported(module: str) -> bool:
    """Whether `module` is there, and not just now being imported: then its hook comes."""
    found = sys.modules.get(module)
    return found is not None and not getattr(found.__spec__, "_initializing", False)


def deactivate() -> None:
    """Undo :func:`activate` in this process."""
    global _active
    _active = False
    for library, ours in LIBRARIES.items():
        if ours in sys.modules:
            sys.modules[ours].unteach(*_dispatchers())
        _hand_back(library)
    from distributed.protocol.serialize import dask_dumps, dask_loads, register_serialization_family

    register_serialization_family("dask", dask_dumps, dask_loads)


def _hand_back(library: str) -> None:
    from distributed import protocol

    for dispatcher in _dispatchers()[:2]:
        dispatcher._lazy.pop(library, None)
        theirs = getattr(protocol, f"_register_{library}", None)
        if theirs is not None:
            dispatcher.register_lazy(library, theirs)


def teach(dispatcher: Any, types: Iterable[type], function: Callable[..., Any]) -> None:
    """Let `dispatcher` use `function` for `types` and what derives from them, also where it has looked them up."""
    forget(dispatcher, types)
    for each in types:
        dispatcher.register(each, function)


def forget(dispatcher: Any, types: Iterable[type]) -> None:
    """Let `dispatcher` know nothing of `types` and what derives from them."""
    bases = tuple(types)
    for known in [known for known in dispatcher._lookup if issubclass(known, bases)]:
        del dispatcher._lookup[known]
