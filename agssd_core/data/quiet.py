"""Keep image readers from printing header values.

pydicom, nibabel and others put offending values (names, dates, identifiers) into warnings and
log lines. While a file from a hospital is open, all of that is dropped; what the user is told is
written by us.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

READERS = (
    "pydicom",
    "nibabel",
    "nibabel.global",
    "openjpeg",
    "jpeg_ls",
    "pylibjpeg",
    "PIL",
    "libav",
)


@contextmanager
def quiet_readers() -> Iterator[None]:
    """Silence the readers' warnings and loggers for the duration of the block."""
    loggers = [logging.getLogger(name) for name in READERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            # Also ends what child loggers send upwards; `disabled` would not.
            logger.handlers, logger.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
