"""A site's volumes in memory, with the attributes that views read."""

import threading
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MemoryInfo:
    shape: tuple[int, int, int]
    modality: str
    foreground_start: tuple[int, int, int]
    foreground_size: tuple[int, int, int]
    foreground_integral: np.ndarray
    foreground_step: int = 4
    patient: str = "p-0"


def memory_info(shape, *, modality="CT", start=None, size=None, body=None, patient="p-0"):
    """Describe a volume whose body box is ``start``/``size`` (default: everything)."""
    start = start or (0, 0, 0)
    size = size or tuple(n - s for n, s in zip(shape, start, strict=True))
    if body is None:
        body = np.zeros(shape, bool)
        body[tuple(slice(s, s + e) for s, e in zip(start, size, strict=True))] = True
    cells = body[::4, ::4, ::4]
    integral = np.pad(cells.astype(np.int64).cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    return MemoryInfo(tuple(shape), modality, tuple(start), tuple(size), integral, patient=patient)


class MemoryVolumes:
    """Volumes that count their reads and refuse to read what they do not have."""

    def __init__(self, arrays, infos, *, broken=()):
        self.arrays = arrays
        self.infos = tuple(infos)
        self.broken = set(broken)
        self.reads = []
        self._lock = threading.Lock()

    def __len__(self):
        return len(self.arrays)

    def read_crop(self, index, start, size):
        if index in self.broken:
            raise OSError("the disk is gone")
        with self._lock:
            self.reads.append((index, start, size))
        array = self.arrays[index]
        stop = [s + e for s, e in zip(start, size, strict=True)]
        assert min(start) >= 0
        assert all(end <= n for end, n in zip(stop, array.shape, strict=True))
        return array[tuple(slice(s, e) for s, e in zip(start, stop, strict=True))].copy()


def blob_volumes(shapes=((40, 44, 36),) * 3, *, modalities=("CT", "MR"), seed=0):
    """Smooth blobs on air, values in [0, 1]."""
    rng = np.random.default_rng(seed)
    arrays, infos = [], []
    for number, shape in enumerate(shapes):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = np.sqrt(sum(axis**2 for axis in axes))
        bumps = sum(
            rng.uniform(0.1, 0.3) * np.sin(rng.uniform(2, 9) * axis + rng.uniform(0, 6))
            for axis in axes
        )
        array = np.clip(np.where(radius < 0.95, 0.5 + bumps, 0), 0, 1).astype(np.float32)
        arrays.append(array)
        infos.append(memory_info(shape, modality=modalities[number % len(modalities)]))
    return MemoryVolumes(arrays, infos)


def tiny_agssd(**nodes):
    """The tiny preset's method with parts replaced, as in ``tiny_agssd(cvac={"n_local": 0})``."""
    from agssd_core.config import PRESETS, AgssdConfig

    merged = {name: dict(node) for name, node in PRESETS["tiny"]["agssd"].items()}
    for name, node in nodes.items():
        merged.setdefault(name, {}).update(node)
    return AgssdConfig.model_validate(merged)
