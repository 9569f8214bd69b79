"""Small files from outside, and folders that one command at a time may change."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agssd_core.errors import KeyFileError


def read_small(path: Path, *, limit: int, what: str) -> bytes:
    """Read a file that must be small.

    Args:
        path: the file.
        limit: greatest number of bytes.
        what: its name in an error, as "the kit".

    Raises:
        KeyFileError: it is missing, too large or no plain file.
    """
    try:
        if not path.is_file():
            raise KeyFileError(f"{what} is not there, or is no plain file. Name an existing one.")
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise KeyFileError(
            f"{what} cannot be read ({type(error).__name__}). Mend its permissions."
        ) from None
    if len(content) > limit:
        raise KeyFileError(
            f"{what} is larger than {limit} bytes, so it is none. Name the right file."
        )
    return content


def require_private(path: Path, *, what: str) -> None:
    """Check that nobody but the owner can reach a file or folder.

    Raises:
        KeyFileError: others can, or it is missing.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        raise KeyFileError(
            f"{what} is missing. Restore it from the backup, or enrol again."
        ) from None
    if mode & 0o077:
        wanted = "700" if path.is_dir() else "600"
        raise KeyFileError(
            f"{what} can be read by others (mode {mode & 0o777:03o}). Set it to {wanted}, and "
            "renew the key if others use this machine."
        )


def private_folder(path: Path, *, what: str) -> None:
    """Make a folder for the owner alone, or check that it is one.

    Raises:
        KeyFileError: others can enter it.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(path, what=what)


@contextmanager
def folder_lock(
    folder: Path,
    *,
    name: str = ".lock",
    what: str = "the folder of the keys",
    busy: str = "another command is working with these keys. Wait for it, then try again.",
) -> Iterator[None]:
    """Let one command at a time work on a folder; a killed one leaves no lock behind.

    Args:
        folder: which.
        name: of the file that is locked.
        what: the folder, in an error.
        busy: error when another command holds it.

    Raises:
        KeyFileError: another command holds it, or it is missing or cannot be written.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KeyFileError(
            f"{what} cannot be used ({type(error).__name__}). Name an existing one or mend its "
            "permissions."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KeyFileError(busy) from None
        yield
    finally:
        os.close(descriptor)


def write_line(descriptor: int, line: bytes, *, at: int) -> None:
    """Write a whole line or none; a kill in between leaves a torn one."""
    done = 0
    try:
        while done < len(line):
            done += os.pwrite(descriptor, line[done:], at + done)
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, at)
        raise
