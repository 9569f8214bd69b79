"""Named arrays: schema, digest, safetensors files, atomic writing.

A group's name is the part of an array's name before the first ``/``: ``student/...``,
``teacher/...``, ``state/...`` (centres and statistics that are merged linearly).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from agssd_core.errors import WeightsError

Array = NDArray[np.generic]
Weights = dict[str, Array]

GROUPS = ("student", "teacher", "state")


@dataclass(frozen=True, order=True)
class ArraySpec:
    """Name, shape and dtype of one array."""

    name: str
    shape: tuple[int, ...]
    dtype: str


Schema = tuple[ArraySpec, ...]


def schema_of(weights: Mapping[str, Array]) -> Schema:
    """Describe arrays, sorted by name."""
    return tuple(
        ArraySpec(name, tuple(weights[name].shape), str(weights[name].dtype))
        for name in sorted(weights)
    )


def schema_digest(schema: Schema) -> str:
    """SHA-256 of a schema."""
    rows = [[spec.name, list(spec.shape), spec.dtype] for spec in schema]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def weights_digest(weights: Mapping[str, Array]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes in sorted order."""
    total = hashlib.sha256()
    for spec in schema_of(weights):
        total.update(json.dumps([spec.name, list(spec.shape), spec.dtype]).encode())
        total.update(np.ascontiguousarray(weights[spec.name]).data)
    return total.hexdigest()


def group(weights: Mapping[str, Array], name: str) -> Weights:
    """The arrays of one group, under their full names."""
    return {key: array for key, array in weights.items() if key.startswith(f"{name}/")}


def require_schema(weights: Mapping[str, Array], schema: Schema) -> None:
    """Check names, shapes and dtypes.

    Raises:
        WeightsError: anything is missing, surplus or of another shape or dtype.
    """
    expected = {spec.name: spec for spec in schema}
    found = {spec.name: spec for spec in schema_of(weights)}
    missing, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise WeightsError(
            f"{len(missing)} array(s) are missing and {len(surplus)} are surplus "
            f"({', '.join((missing + surplus)[:3])}). Use the same model configuration and version."
        )
    for name, spec in expected.items():
        if found[name] != spec:
            raise WeightsError(
                f"array {name} is {found[name].dtype}{found[name].shape}, expected "
                f"{spec.dtype}{spec.shape}. Use the same model configuration and version."
            )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_weights(
    path: Path, weights: Mapping[str, Array], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: temporary name, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder is made when it is missing.
        weights: named arrays.
        metadata: text that the file carries beside them.

    Raises:
        WeightsError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Not ascontiguousarray: that would turn a scalar's shape () into (1,).
    contiguous = {name: np.asarray(array, order="C") for name, array in sorted(weights.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise WeightsError(
            f"weights could not be written ({type(error).__name__}). Free disk space or mend the "
            "folder's permissions; the previous file is untouched."
        ) from None


def load_weights(path: Path, *, names: Iterable[str] | None = None) -> Weights:
    """Read a safetensors file, or only some of its arrays.

    Raises:
        WeightsError: the file is missing, damaged or lacks a wanted array.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            wanted = list(stream.keys()) if names is None else list(names)
            return {name: stream.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        message = "the weights file is missing. Name an existing .safetensors file."
        raise WeightsError(message) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"the weights file cannot be read ({type(error).__name__}): it is damaged or not "
            "safetensors. Restore it from another copy or the round before."
        ) from None


def weights_to_bytes(weights: Mapping[str, Array]) -> bytes:
    """Serialise arrays as safetensors, for a message."""
    return save({name: np.asarray(array, order="C") for name, array in sorted(weights.items())})


def weights_from_bytes(data: bytes) -> Weights:
    """Read what ``weights_to_bytes`` wrote.

    Raises:
        WeightsError: the bytes are damaged or not safetensors.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise WeightsError(
            f"received arrays cannot be read ({type(error).__name__}): they were damaged on the "
            "way or are not safetensors. Send them again."
        ) from None


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a small text file atomically; ``private`` gives it mode 0600."""
    write_bytes(path, text.encode("utf-8"), private=private)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a small file atomically; ``private`` gives it mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o600 if private else 0o644
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
