"""A small world as files, and a small model of it as a folder: what a user brings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from palimpsest.data.records import COLUMNS
from palimpsest.data.world import World
from palimpsest.models.lm import LM


@dataclass(frozen=True)
class Files:
    folder: Path
    forget: str
    retain: str
    holdout: str
    train: str
    model: str


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("user")
    world = World(people=16, seed=3, facts=4)
    request = world.request()
    tables = {"forget": request.forget, "retain": request.retain, "holdout": request.holdout, "train": world.train}
    for name, table in tables.items():
        lines = ({key: row[key] for key in (*COLUMNS, "person") if row.get(key) is not None} for row in table or ())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    LM.build(world.train, "llama-tiny", vocab_size=400, max_length=128).save(folder / "model")
    return Files(folder, *(str(folder / f"{name}.jsonl") for name in tables), str(folder / "model"))


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_KEY", str(tmp_path / "key.pem"))
