"""Random generators that depend on nothing but the words they are made from."""

import hashlib
import json

import numpy as np
import torch


def rng_for(seed: int, *parts: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose, as in ``rng_for(0, "site-a", "views", step)``.

    The parts are hashed, so neighbouring steps or sites share no stream.
    """
    return np.random.Generator(np.random.PCG64(_digest(seed, parts)))


def torch_generator_for(seed: int, *parts: str | int) -> torch.Generator:
    """A torch generator on the CPU for one purpose; see :func:`rng_for`."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(_digest(seed, parts) & (2**63 - 1))
    return generator


def _digest(seed: int, parts: tuple[str | int, ...]) -> int:
    # JSON keeps ("a", 1) apart from ("a1",) and 1 apart from "1".
    text = json.dumps([int(seed), *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
