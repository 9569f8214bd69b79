"""The server's own pulls: a reply above its cap is refused before its arrays are fetched.

This relies on private names of Flower; they are checked before the rounds begin, and a missing
one refuses the start.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from agssd_core.allowance import Form, fetch_header
from agssd_core.errors import EngineError, OversizeError
from server.wire import NOT_FETCHED

_GRID = "flwr.superlink.grid.http_grid"
_OBJECTS = "flwr.supercore.inflatable.inflatable_object"
# A site uploads its arrays first and the message last.
_UNTIL_UPLOADED = {"initial_backoff": 0.2, "backoff_cap": 1.0, "max_tries_per_object": None}
_HOOKS: Mapping[tuple[str, str], tuple[str, ...]] = {
    (_GRID, "pull_objects"): ("object_ids", "pull_object_fn", *_UNTIL_UPLOADED),
    (_GRID, "ObjectPullError"): ("object_id", "reason"),
    (_GRID, "ConfirmMessageReceivedRequest"): (),
    (_OBJECTS, "get_object_head_values_from_object_content"): ("object_content",),
}
_most: ContextVar[int | None] = ContextVar("most_bytes_of_a_reply", default=None)


@contextmanager
def at_most(max_bytes: int) -> Iterator[None]:
    """Fetch no arrays of more than so many bytes within this block, in this thread."""
    token = _most.set(max_bytes)
    try:
        yield
    finally:
        _most.reset(token)


def require_hooks() -> None:
    """Check that this Flower has the names that we build on.

    Raises:
        EngineError: one is missing or takes other arguments.
    """
    for (place, name), wanted in _HOOKS.items():
        found = getattr(_module(place), name, None)
        if found is None or not set(wanted) <= set(_parameters(found) if wanted else ()):
            raise EngineError(
                f"the installed Flower has no {place}.{name} as this version needs it. Install "
                "flwr 1.41, which constraints.txt pins."
            )


def limit_pulls(grid: Any) -> None:
    """Make Flower's grids hold replies against the cap of ``at_most``.

    Args:
        grid: the run's; a reply that is not fetched is forgotten by the SuperLink through it.

    Raises:
        EngineError: another Flower is installed than this version needs.
    """
    require_hooks()
    engine = _module(_GRID)
    engine.pull_objects = _limited(engine.pull_objects, engine, grid)


def object_form() -> Form:
    """How Flower writes objects."""
    from flwr.app import ConfigRecord

    return Form(_module(_OBJECTS).get_object_head_values_from_object_content, ConfigRecord.inflate)


def _limited(pull: Callable[..., Any], engine: Any, grid: Any) -> Callable[..., Any]:
    """Flower's ``pull_objects``, from the message down and counted."""

    def limited(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **given: Any) -> Any:
        most = _most.get()
        if most is None:
            raise EngineError("a reply was to be fetched without a cap on its size.")

        def patiently(names: list[str], fetch: Callable[[str], bytes]) -> dict[str, bytes]:
            found: dict[str, bytes] = pull(names, fetch, **(given | _UNTIL_UPLOADED))
            return found

        try:
            found, left = fetch_header(
                object_ids, pull_object_fn, patiently, form=object_form(), most=most
            )
            rest = [name for name in object_ids if name not in found]
            return found | pull(rest, left.counting(pull_object_fn), **given)
        except OversizeError:
            _forget(engine, grid, object_ids[-1])
            # The grid makes an error reply of it, which server/wire.py knows.
            raise engine.ObjectPullError(object_ids[-1], NOT_FETCHED) from None

    return limited


def _forget(engine: Any, grid: Any, message_id: str) -> None:
    """Have the SuperLink drop what it holds of a message; its memory is finite, too."""
    with contextlib.suppress(Exception):
        request = engine.ConfirmMessageReceivedRequest(
            node=grid.node, run_id=grid.run.run_id, message_object_id=message_id
        )
        grid._runtime_client.ConfirmMessageReceived(request)


def _parameters(found: Any) -> Mapping[str, Any]:
    return inspect.signature(found).parameters


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise EngineError(
            f"the installed Flower has no {name}. Install flwr 1.41, which constraints.txt pins."
        ) from None
