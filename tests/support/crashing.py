"""Worker functions that die on one scan, as a broken decoder in C would, or that wait."""

import os
import time
from pathlib import Path

from agssd_core.data.prepare import Job
from agssd_core.data.prepare import prepare_one as really_prepare


def crash_on_mr(job: Job):
    if job.record.modality == "MR":
        os._exit(11)
    return really_prepare(job)


def wait_after_two(job: Job):
    """Prepare two scans, tell who did it, and be busy with the third until killed."""
    folder = job.site_dir / "cache"
    if folder.is_dir() and len(list(folder.glob("*.json"))) >= 2:
        time.sleep(60)
    reason = really_prepare(job)
    os.write(1, f"{os.getpid()}\n".encode())
    return reason


def crash_on_video(job: Job):
    if job.record.kind == "video":
        os._exit(11)
    return really_prepare(job)


def wait_until_gone(processes, seconds=10.0):
    ends = time.monotonic() + seconds
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends, f"{left} outlive their parent"
        time.sleep(0.05)
