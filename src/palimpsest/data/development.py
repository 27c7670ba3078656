"""Where the real data sets lie that some claims use: beside the repository, or where PALIMPSEST_DEV_DATA says."""

from __future__ import annotations

import os
from pathlib import Path

import palimpsest


def development_data() -> Path | None:
    """The folder, or None where there is none: they are not part of the package."""
    given = os.environ.get("PALIMPSEST_DEV_DATA")
    folder = Path(given) if given else Path(palimpsest.__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None
