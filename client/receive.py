"""What an order must be before it is carried out: envelope, weights, plan; in this order."""

import hashlib
from pathlib import Path

from agssd_core.config import RunConfig, config_from_json, dump_config
from agssd_core.differences import decode, unpack_whole
from agssd_core.envelope import SealedFinal, SealedOrder, require_payload, verify
from agssd_core.errors import (
    ConfigError,
    OrderRefusedError,
    PayloadError,
    ProtocolError,
    SignatureError,
)
from agssd_core.protocol import HELD, RoundOrder
from agssd_core.weights import Weights, schema_digest, schema_of, weights_digest
from client.bases import KeptBase
from client.identity import Identity


def require_envelope(
    sealed: SealedOrder | SealedFinal, *, site: str, identity: Identity | None
) -> None:
    """Check who sent an order, to whom, and that its parts are those it declares.

    The order is of a round or of a final checkpoint.

    Args:
        sealed: as it came; nothing about it is trusted, and nothing is decoded.
        site: enrolled name.
        identity: None on an unsigned connection; otherwise only the pinned key is believed.

    Raises:
        OrderRefusedError: ``signature``, ``site``, or ``base`` when the parts are damaged.
    """
    order = sealed.order
    if identity is not None:
        try:
            verify(order, sealed.signature, (identity.server_key,))
        except SignatureError as error:
            raise OrderRefusedError(str(error), reason="signature") from None
    if order.site != site:
        message = "the order is another site's. Order each site by its own name."
        raise OrderRefusedError(message, reason="site")
    try:
        require_payload(order, sealed.payload)
    except PayloadError as error:
        message = f"the order's weights cannot be used ({error}). Send the order again."
        raise OrderRefusedError(message, reason="base") from None


def opened(sealed: SealedOrder, *, folder: Path) -> Weights:
    """The weights that an order starts from.

    Args:
        sealed: with an envelope that was checked.
        folder: the site's, where it keeps the cohort's last base.

    Raises:
        OrderRefusedError: ``cohort``, or ``base`` when the site lacks the weights that these are
            a difference to; the server then sends them whole.
        WeightsError: the arrays are not those of the order's own form.
    """
    order = sealed.order
    weights = _decoded(sealed, KeptBase.of(folder, order.cohort))
    if schema_digest(schema_of(weights)) != order.schema_digest:
        message = "the order's weights are not of its own schema. Send the order again."
        raise OrderRefusedError(message, reason="base")
    return weights


def _decoded(sealed: SealedOrder, kept: KeptBase) -> Weights:
    order = sealed.order
    same = kept.read(order.base_digest)
    if same is not None:
        return same
    if order.wire == "float32":
        return unpack_whole(sealed.payload)
    previous = None if order.wire == HELD else kept.read(order.previous_digest)
    if previous is None:
        message = "the site does not hold the base of the order's weights. Send them whole."
        raise OrderRefusedError(message, reason="base")
    # Anything but int8 must fit bf16's form, or is refused as damaged.
    return decode(sealed.payload, previous, wire="int8" if order.wire == "int8" else "bf16")


def checked(order: RoundOrder, weights: Weights) -> RunConfig:
    """Hold an order against its own plan; nothing is trained that the plan does not say.

    Raises:
        OrderRefusedError: ``plan``, or ``base`` when the weights are not those it names.
    """
    try:
        config = config_from_json(order.config)
    except (ConfigError, ProtocolError):
        message = "the order's configuration is not valid here. Use the same version."
        raise OrderRefusedError(message, reason="plan") from None
    plan = config.federation
    fits = (
        plan.cohort == order.cohort
        and 0 <= order.round < plan.rounds
        and order.steps == plan.steps_per_round
        and order.total_steps == plan.total_steps
        and order.first_step == order.round * order.steps
    )
    if not fits:
        message = "the order's steps are not those of its own plan. Send the plan's steps."
        raise OrderRefusedError(message, reason="plan")
    if weights_digest(weights) != order.base_digest:
        message = "the order's weights were damaged on the way. Send the order again."
        raise OrderRefusedError(message, reason="base")
    return config


def plan_hash(config: RunConfig) -> str:
    """Digest of what decides the bits of a site's training, for stamps.

    Training itself gets the order's configuration. ``stop_on_collapse`` decides whether an
    update leaves, not what it holds, so a resumed run may turn it on and keeps optimisers.
    """
    training = config.training.model_copy(update={"loader_workers": 1})
    monitor = config.monitor.model_copy(update={"stop_on_collapse": False})
    plain = config.model_copy(update={"training": training, "monitor": monitor})
    return hashlib.sha256(dump_config(plain).encode()).hexdigest()
