"""Sites of prepared clips."""

from agssd_core.data.frames import SiteFrames
from tests.support.raw_clips import (
    SMALL,
)


def open_frames(site, config=SMALL):
    return SiteFrames.open(site, config, need_labels=False)


def with_frames(**changes):
    return SMALL.model_copy(update={"frames": SMALL.frames.model_copy(update=changes)})
