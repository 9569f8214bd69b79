"""Starts the ranks of a round, and ends all of them when one ends badly.

``python -m agssd_core.training.ranks FOLDER COUNT``, with a job folder of ``worker``.
"""

import sys
from pathlib import Path

from torch.multiprocessing.spawn import spawn


def rank(number: int, folder: Path, processes: int) -> None:
    """One rank's process."""
    from agssd_core.training.worker import run_rank  # whoever only starts ranks need not wait

    run_rank(number, folder, processes)


if __name__ == "__main__":
    count = int(sys.argv[2])
    spawn(rank, args=(Path(sys.argv[1]), count), nprocs=count)  # type: ignore[no-untyped-call]
