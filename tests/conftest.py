"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or a skip that says what is missing."""
    named = os.environ.get("AGSSD_REAL_DATA", "")
    if not named or not Path(named).is_dir():
        pytest.skip("AGSSD_REAL_DATA does not name a folder of real images")
    return Path(named)
