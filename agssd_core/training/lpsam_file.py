"""A fitted LP-SAM in a file that sites can trust: ``lpsam-*.safetensors`` and ``*.sig.json``.

The weights file carries configuration, versions and the record of the fit. Its SHA-256 is signed
with Ed25519; the signature tells a whole file from a damaged or changed one, the digest, which
the coordinator gives by another way, tells which file was meant.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from agssd_core.config.load import dump_config
from agssd_core.config.lpsam import LpsamConfig
from agssd_core.errors import WeightsError
from agssd_core.models.lpsam import LpSam
from agssd_core.training.lpsam_fit import FitRecord, lpsam_shape
from agssd_core.weights import file_digest, load_weights, save_weights, write_text

FORMAT = "agssd-lpsam-1"
_PACKAGES = ("agssd-federation", "torch", "transformers")


@dataclass(frozen=True)
class LpsamFile:
    """A read and verified file.

    Attributes:
        digest: SHA-256 of the weights file. signer: public key, hexadecimal.
        about: versions, record of the fit, digest of the public pairs.
    """

    network: LpSam
    config: LpsamConfig
    digest: str
    signer: str
    about: dict[str, Any]


def signature_path(path: Path) -> Path:
    """Where the signature of a file lies."""
    return path.with_name(path.name + ".sig.json")


def open_key(path: Path) -> Ed25519PrivateKey:
    """Read the signing key, or make one on first use; only its owner may read the file.

    Raises:
        WeightsError: the file is no such key, or others may read it.
    """
    if not path.exists():
        fresh = Ed25519PrivateKey.generate()
        text = fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_text(path, text.decode("ascii"), private=True)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise WeightsError(
            "the signing key can be read by others, which makes it worthless. Give it mode 0600, "
            "or name another file, which is then made."
        )
    with suppress(ValueError, TypeError):
        key = load_pem_private_key(path.read_bytes(), password=None)
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise WeightsError(
        "the signing key is no Ed25519 key in PEM. Name the right file, or a new one, which is "
        "then made."
    )


def write_lpsam(
    path: Path,
    network: LpSam,
    config: LpsamConfig,
    *,
    record: FitRecord,
    pairs_digest: str,
    key: Ed25519PrivateKey,
    table: Mapping[str, Any] | None = None,
) -> str:
    """Write and sign a fitted network.

    Args:
        path: the ``.safetensors`` file; the signature is written beside it, first the old one
            is removed, so that a break leaves an unsigned file, which no site takes.
        network: fitted.
        config: of the fit; paths in it are left out.
        record: of the fit.
        pairs_digest: of the public images and masks.
        key: to sign with.
        table: further figures, such as Dice.

    Returns:
        The file's SHA-256.
    """
    public = config.model_copy(update={"weights": "", "window": config.window_size})
    about = {
        "format": FORMAT,
        "config": dump_config(public),
        "versions": json.dumps({name: version(name) for name in _PACKAGES}),
        "record": json.dumps(asdict(record)),
        "pairs": pairs_digest,
        "figures": json.dumps(dict(table or {})),
    }
    signature_path(path).unlink(missing_ok=True)
    arrays = {name: item.detach().cpu().numpy() for name, item in network.state_dict().items()}
    save_weights(path, arrays, metadata=about)
    digest = file_digest(path)
    signed = {
        "format": FORMAT,
        "sha256": digest,
        "public_key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(_message(digest)).hex(),
    }
    write_text(signature_path(path), json.dumps(signed, indent=1) + "\n")
    return digest


def read_lpsam(path: Path, *, trusted: frozenset[str]) -> LpsamFile:
    """Read a file after checking signature and digest; anything amiss refuses it.

    Args:
        path: the ``.safetensors`` file.
        trusted: digests that this site accepts.

    Raises:
        WeightsError: the file is missing, unsigned, changed, not trusted, or no LP-SAM.
    """
    digest, signer = verify_lpsam(path, trusted=trusted)
    about = _about(path)
    try:
        config = LpsamConfig.model_validate_json(about["config"])
        about |= {name: json.loads(about[name]) for name in ("versions", "record", "figures")}
    except (ValidationError, ValueError, KeyError):
        raise WeightsError(
            "the LP-SAM file's configuration does not fit this version. Have it fitted again with "
            "the version that runs here."
        ) from None
    with torch.device("meta"):
        network = LpSam(lpsam_shape(config))
    arrays = {name: torch.from_numpy(array) for name, array in load_weights(path).items()}
    try:
        network.load_state_dict(arrays, strict=True, assign=True)
    except RuntimeError:
        raise WeightsError(
            "the LP-SAM file's arrays do not fit its configuration. Have it fitted again with "
            "the version that runs here."
        ) from None
    for parameter in network.parameters():
        parameter.requires_grad = False
    return LpsamFile(network.eval(), config, digest, signer, about)


def verify_lpsam(path: Path, *, trusted: frozenset[str]) -> tuple[str, str]:
    """Check signature and digest of a file without reading its arrays.

    Returns:
        Its digest and the signer's public key.

    Raises:
        WeightsError: see ``read_lpsam``.
    """
    if not path.is_file():
        raise WeightsError("the LP-SAM file is missing. Name the .safetensors file as --lpsam.")
    digest = file_digest(path)
    signer = _signer(path, digest)
    if digest not in trusted:
        raise WeightsError(
            f"the LP-SAM file's digest {digest} is not one that this site trusts. Compare it with "
            "the coordinator's by another way than the file came; if they are equal, pass it as "
            "--digest, or list it in policy.yaml of the site's folder under lpsam: digests."
        )
    return digest, signer


def _signer(path: Path, digest: str) -> str:
    try:
        signed = json.loads(signature_path(path).read_text(encoding="utf-8"))
        key = bytes.fromhex(signed["public_key"])
        Ed25519PublicKey.from_public_bytes(key).verify(
            bytes.fromhex(signed["signature"]), _message(digest)
        )
    except FileNotFoundError:
        raise WeightsError(
            f"the LP-SAM file has no signature. Put {path.name}.sig.json beside it, from where "
            "the file came."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidSignature):
        raise WeightsError(
            "the LP-SAM file does not fit its signature: one of them was changed or damaged. Have "
            "both delivered again."
        ) from None
    return key.hex()


def _message(digest: str) -> bytes:
    return f"{FORMAT} {digest}".encode()


def _about(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as stream:
            about = dict(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        about = {}
    if about.get("format") != FORMAT:
        raise WeightsError(
            f"the file is no LP-SAM of format {FORMAT}. Name the file that `agssd-sim lpsam-fit` "
            "wrote."
        )
    return about
