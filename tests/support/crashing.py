"""Worker functions that die on one volume, as a broken decoder in C would, or that wait."""

import os
import time

from agssd_core.data.prepare import Job
from agssd_core.data.prepare import prepare_one as really_prepare


def crash_on_mr(job: Job):
    if job.record.modality == "MR":
        os._exit(11)
    return really_prepare(job)


def wait_after_two(job: Job):
    """Prepare two volumes, tell who did it, and be busy with the third until killed."""
    folder = job.site_dir / "cache"
    if folder.is_dir() and len(list(folder.glob("*.json"))) >= 2:
        time.sleep(60)
    reason = really_prepare(job)
    os.write(1, f"{os.getpid()}\n".encode())
    return reason
