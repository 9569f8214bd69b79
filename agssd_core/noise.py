"""Random numbers that nobody can predict: AES in counter mode, keyed by the operating system.

Whoever can predict the noise can subtract it, and whoever knows who was drawn gains what the
sampling hides. Both therefore come from here, never from a run's seed.
"""

import hashlib
import os
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_KEY_BYTES, _WORD_BYTES = 32, 8
# Normal numbers made in one piece; large enough for NumPy, small enough for a cache.
_PIECE = 1 << 16
_MANTISSA = 53


class NoiseStream:
    """Uniform and normal numbers in float64 from one AES-256 key stream.

    Attributes:
        private: False for a stream that a seed repeats; what is noised by it is not private.
    """

    def __init__(self, key: bytes, *, private: bool) -> None:
        # A key is used for one stream alone, so the counter may start at 0.
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()
        self.private = private

    @classmethod
    def from_system(cls) -> Self:
        """A stream under a fresh key from the operating system."""
        return cls(os.urandom(_KEY_BYTES), private=True)

    @classmethod
    def repeatable(cls, seed: int, *parts: str | int) -> Self:
        """The same numbers for the same words: for tests, never private."""
        text = repr(("repeatable noise", seed, *parts))
        return cls(hashlib.sha256(text.encode()).digest(), private=False)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` numbers in (0, 1], multiples of 2^-53."""
        words = self._encryptor.update(bytes(count * _WORD_BYTES))
        whole = np.frombuffer(words, dtype="<u8") >> np.uint64(64 - _MANTISSA)
        return (whole.astype(np.float64) + 1.0) * 2.0**-_MANTISSA

    def normal(self, count: int) -> NDArray[np.float64]:
        """``count`` standard normal numbers.

        Source:
            Box & Muller 1958, "A note on the generation of random normal deviates".
        """
        found = np.empty(count + count % 2)
        for start in range(0, len(found), _PIECE):
            piece = found[start : start + _PIECE]
            half = len(piece) // 2
            radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
            angle = 2.0 * np.pi * self.uniform(half)
            np.multiply(radius, np.cos(angle), out=piece[:half])
            np.multiply(radius, np.sin(angle), out=piece[half:])
        return found[:count]
