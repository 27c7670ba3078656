"""Every example in the README and the docs: Python blocks run, commands parse, files are where the pages say."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from palimpsest import cli
from palimpsest.data.records import COLUMNS
from palimpsest.data.world import World
from palimpsest.models.lm import LM

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every line of a shell block that starts with palimpsest, continued lines joined."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("palimpsest ")
    ]
    return sorted({line.split("  #")[0].strip() for line in lines})


def answer(words: list[str]) -> object:
    """The exit code of a command, whether it returns it or stops with it (as --help does)."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """The files that the examples name."""
    import json

    world = World(people=16, seed=5, facts=4)
    request = world.request()
    for name, table in {"leaked": request.forget, "keep": request.retain}.items():
        rows = ({key: row[key] for key in COLUMNS if row.get(key) is not None} for row in table or ())
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    LM.build(world.train, "llama-tiny", vocab_size=300, max_length=128).save(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_examples_run(page, users_folder):
    names = {"__name__": "example"}  # a page's later blocks go on from its earlier ones
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_there_are_commands_to_try():
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch, capsys):
    """The jobs are replaced, so only names and flags are tried."""
    from palimpsest.app import server
    from palimpsest.jobs import compare, learn, pages, papers, reproduce, run, single, verify

    monkeypatch.setattr(run, "run", lambda options: 0)
    verbs = {key: (lambda _: 0, options) for key, (_, options) in compare.VERBS.items()}
    families = {key: dataclasses.replace(family, job=lambda *_: 0) for key, family in learn.FAMILIES.items()}
    monkeypatch.setattr(compare, "VERBS", verbs)
    monkeypatch.setattr(learn, "FAMILIES", families)
    monkeypatch.setattr(papers, "papers", lambda query, options: 0)
    monkeypatch.setattr(server, "serve", lambda options: 0)
    monkeypatch.setattr(pages, "site", lambda options: 0)
    monkeypatch.setattr(pages, "digest", lambda options: 0)
    monkeypatch.setattr(verify, "verify", lambda folder, options: 0)
    monkeypatch.setattr(reproduce, "reproduce", lambda slugs, options: 0)
    jobs = {verb: (lambda info, method, options: 0, kinds) for verb, (_, kinds) in single.JOBS.items()}
    monkeypatch.setattr(single, "JOBS", jobs)
    words = shlex.split(command)[1:]
    if not {"METHOD", "COMMAND"} & set(words):
        assert answer(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_modules_named_for_the_reference_exist():
    import importlib

    for page in PAGES:
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(name)


def test_contributing_shows_the_real_method():
    shown = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = (ROOT / "src/palimpsest/forget/ascent.py").read_text(encoding="utf-8")
    first = next(line.strip() for line in shown.splitlines() if "class GradientAscent" in line)
    assert first in source
