"""The Flower ClientApp of a site: decode, act, encode; no learning, no file access.

Flower sends ``str(exception)`` to the server, so nothing is raised past a handler. Texts of our
own errors name no patient and may leave; of any other exception only the class name does.
"""

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from agssd_core.delivery import FinalOrder
from agssd_core.envelope import SealedRefusal
from agssd_core.errors import AgssdError, OrderRefusedError
from agssd_core.protocol import PROTOCOL_VERSION, Refusal, RoundOrder, SiteQuery
from client import wire
from client.delivery import take_final
from client.site import Site, SiteOpener, named_site
from client.workbench import AgssdWorkbench

log = logging.getLogger(__name__)


def make_app(open_site: SiteOpener) -> ClientApp:
    """The app whose handlers act on the site that ``open_site`` finds for a node."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """One round at this site."""
        return _guarded(message, lambda asked: _train(message, context, open_site, asked))

    @app.train("final")
    def final(message: Message, context: Context) -> Message:
        """The run's final checkpoint comes."""
        return _guarded(message, lambda asked: _final(message, context, open_site, asked))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        """Who we are."""
        return _guarded(message, lambda asked: _hello(message, context, open_site, asked))

    return app


@dataclass
class _Asked:
    """The order or question under way, and the site that notes and signs a refusal."""

    order: RoundOrder | FinalOrder | None = None
    query: SiteQuery | None = None
    site: Site | None = None


def _hello(message: Message, context: Context, open_site: SiteOpener, asked: _Asked) -> Message:
    asked.query = wire.decode_query(message)
    asked.site = open_site(context.node_config)
    return wire.encode_hello(asked.site.hello(asked.query), reply_to=message)


def _train(message: Message, context: Context, open_site: SiteOpener, asked: _Asked) -> Message:
    sealed = wire.decode_order(message)
    asked.order = sealed.order
    asked.site = open_site(context.node_config)
    return wire.encode_update(asked.site.answer(sealed), reply_to=message)


def _final(message: Message, context: Context, open_site: SiteOpener, asked: _Asked) -> Message:
    sealed = wire.decode_final(message)
    asked.order = sealed.order
    site = asked.site = open_site(context.node_config)
    receipt = take_final(sealed, site.folder, site.name, site.identity, site.guard)
    return wire.encode_receipt(receipt, reply_to=message)


def _guarded(message: Message, act: Callable[[_Asked], Message]) -> Message:
    asked = _Asked()
    try:
        return act(asked)
    except OrderRefusedError as error:
        return _refused(message, error, asked)
    except AgssdError as error:
        log.error("%s: %s", type(error).__name__, error)
        return wire.encode_fault(f"{type(error).__name__}: {error}", reply_to=message)
    except Exception as error:  # noqa: BLE001 - its text may name a patient
        # Frames show where; the text of a foreign exception may hold a path or a header value.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s\n%s", type(error).__name__, frames)
        return wire.encode_fault(type(error).__name__, reply_to=message)


def _refused(message: Message, error: OrderRefusedError, asked: _Asked) -> Message:
    other_cohort = asked.query is not None and error.reason == "cohort"
    # A site is asked for every cohort, so a "no" to one is no fault of anybody's.
    log.log(logging.INFO if other_cohort else logging.WARNING, "declined: %s", error)
    if asked.order is None and not other_cohort:
        return wire.encode_fault(str(error), reply_to=message)
    order = asked.order
    if order is not None and asked.site is not None:
        asked.site.guard.refused(order, error.reason)
    refusal = Refusal(
        protocol=PROTOCOL_VERSION,
        site=asked.site.name if asked.site is not None and order is not None else "",
        run=order.run if order is not None else "",
        round=order.round if order is not None else 0,
        nonce=order.nonce if order is not None else "",
        reason=error.reason,
    )
    sealed = SealedRefusal(refusal) if asked.site is None else asked.site.decline(refusal)
    return wire.encode_refusal(sealed, reply_to=message)


app = make_app(partial(named_site, workbench=AgssdWorkbench()))
