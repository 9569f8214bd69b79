"""What the three command lines share: errors as one line, progress with or without a terminal."""

import errno
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from typer.core import TyperGroup

from agssd_core.errors import AgssdError, ConfigError

Advance = Callable[[int, int], None]
Bar = Callable[[str], AbstractContextManager[Advance]]
"""Opens a progress bar under a title."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
PLAIN_SECONDS = 5.0
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class CommandGroup(TyperGroup):
    """Verbs whose own errors become a line on stderr and exit code 2; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb."""
        try:
            return super().invoke(ctx)
        except AgssdError as error:
            say_error(error)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except OSError as error:
            if error.errno not in _DISK_TROUBLE:
                raise
            write_error(
                f"a file could not be written or read ({error.strerror}). Free disk space or mend "
                "permissions, then run the same command again; what is done is kept."
            )
            raise typer.Exit(EXIT_USER_ERROR) from None
        except KeyboardInterrupt:
            write_error("interrupted; what is done is kept. Run the same command to go on.")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def new_app(help_text: str) -> typer.Typer:
    """An empty Typer application; add verbs with ``@app.command()``."""
    return typer.Typer(
        cls=CommandGroup,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def say_error(error: AgssdError) -> None:
    """Write an error to stderr: one line, or one for each problem of a configuration."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    for problem in problems:
        write_error(" ".join(problem.splitlines()))


def write_error(line: str) -> None:
    """Write one line to stderr, never wrapped."""
    stderr.print(escape(line), soft_wrap=True, style="red" if stderr.is_terminal else None)


def say(line: str) -> None:
    """Write one line to stdout, never wrapped; square brackets are plain text."""
    stdout.print(escape(line), soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """A progress bar with rate and remaining time; plain lines when stderr is no terminal.

    Yields:
        A function to call with (done, total).
    """
    if not stderr.is_terminal:
        yield _plain_lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def kept_interrupt() -> Iterator[Callable[[], None]]:
    """Yield a check that raises an interrupt again which was raised but went no further.

    Python drops exceptions inside finalisers and callbacks, a KeyboardInterrupt too; long work
    calls the check between its parts, so that Ctrl-C costs one part at most.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # only the main thread gets signals
        return
    noted = threading.Event()

    def note(_number: int, _frame: object) -> None:
        noted.set()
        raise KeyboardInterrupt

    def check() -> None:
        if noted.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        """Draw the column."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def _plain_lines(title: str) -> Advance:
    begun = last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < PLAIN_SECONDS:
            return
        last = now
        rate = done / max(now - begun, 1e-9)
        sys.stderr.write(f"{title}: {done}/{total}, {rate:.1f}/s\n")
        sys.stderr.flush()

    return advance
