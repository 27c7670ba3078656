"""What every test stands on: a cache of its own, one thread, no network, no progress bars, and the development data."""

from __future__ import annotations

import os

os.environ.update(  # before torch, transformers and datasets are imported anywhere
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)

import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache a session and worker: what one test builds, the next may read."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that PALIMPSEST_CACHE names; a test that needs an empty one sets the variable itself."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(session_cache))
    return session_cache


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models of the tests' size are slower on more threads, and several workers share the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """The folder of real development data, beside the repository or where PALIMPSEST_DEV_DATA says."""
    given = os.environ.get("PALIMPSEST_DEV_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no development data: {folder} is not there (set PALIMPSEST_DEV_DATA)")
    return folder
