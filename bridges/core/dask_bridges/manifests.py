"""The manifest of a checkpoint: the one small file that makes it exist, and tells what belongs to it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dask_bridges.errors import DataError

__all__ = ["Broken", "File", "Gone", "Manifest", "digest", "name_of", "steps_in"]

_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{12,})\.json")


class Broken(Exception):  # noqa: N818 - those who read checkpoints make it an error, or go on to an older one
    """A checkpoint that is not there, or not as it was written."""


class Gone(Broken):
    """A checkpoint that is not there: never was, or has been removed since it was listed."""


@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Attributes
    ----------
    file : str
        Its name in the checkpoint's folder.
    size : int
        In bytes.
    digest : str
        Its checksum.
    """

    file: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What belongs to a checkpoint.

    Attributes
    ----------
    step : int
    folder : str
        Where its files are, beside the manifest.
    files : dict of str to File
        By the names the user gave them.
    meta : dict of str to object
        What the user wants to know with it.
    """

    step: int
    folder: str
    files: dict[str, File]
    meta: dict[str, Any]

    def dump(self) -> bytes:
        """As JSON, with a checksum of its own.

        Raises
        ------
        DataError
            If `meta` cannot be JSON.
        """
        try:
            # What is read back is what the checksum is of: keys that were numbers are strings there.
            plain = json.loads(json.dumps(asdict(self)))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the meta data of checkpoint {self.step} cannot be JSON: {error}. Numbers of NumPy and tensors "
                "become plain ones with float(), int() or .tolist(); what is large belongs into files"
            ) from error
        return json.dumps({"version": _VERSION, "digest": _digest_of(plain), "checkpoint": plain}).encode()

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """What `dump` gave.

        Raises
        ------
        Broken
            If it is anything else.
        """
        try:
            outer = json.loads(text)
            if outer["version"] != _VERSION:
                raise ValueError(f"version {outer['version']}, of another dask-bridges than this one")
            fields = outer["checkpoint"]
            if _digest_of(fields) != outer["digest"]:
                raise ValueError("its checksum differs")
            return cls(**fields | {"files": {name: File(**file) for name, file in fields["files"].items()}})
        except (ValueError, KeyError, TypeError) as error:
            raise Broken(f"its manifest is damaged: {type(error).__name__}: {error}") from error


def digest(content: Any) -> str:
    """The checksum of bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of(plain: Any) -> str:
    return digest(json.dumps(plain).encode())


def name_of(step: int) -> str:
    """What the manifest of a step is called."""
    return f"checkpoint-{step:012d}.json"


def steps_in(names: Iterable[str]) -> list[int]:
    """The steps whose manifests are among these names, ascending."""
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
