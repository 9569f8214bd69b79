"""Given ultrasound frames in memory, and settings of the ultrasound views."""

import threading

from agssd_core.config.anaus import AnausConfig
from tests.support.us import MemoryFrameInfo

SHARP = {"jitter": 0.0, "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
UNDAMAGED = {"shuffle_p": 0.0, "intensity_p": 0.0, "inpaint_p": 0.0}


class GivenFrames:
    """Frames and label maps that a test has made; remembers what was read."""

    def __init__(self, images, maps, *, broken=()):
        self.images, self.maps, self.broken = images, maps, set(broken)
        self.infos = tuple(
            MemoryFrameInfo(f"clip{n}", 0, f"p{n}", "GE", image.shape)
            for n, image in enumerate(images)
        )
        self._lock = threading.Lock()
        self.reads = []

    def __len__(self):
        return len(self.images)

    def read_frame(self, index):
        if index in self.broken:
            raise OSError("the disk is gone")
        with self._lock:
            self.reads.append(index)
        return self.images[index]

    def read_labels(self, index):
        return self.maps[index]


def views_config(*, size=64, augment=None, overlap=None):
    """Settings of small views; ``augment`` and ``overlap`` replace parts."""
    return AnausConfig.model_validate(
        {
            "augment": {"size": size, **(augment or {})},
            "overlap": overlap or {},
            "regions": {"scales": (size // 32, size // 16, size // 8, size // 4)},
        }
    )
