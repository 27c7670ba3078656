"""The command line: what it answers at once, how it says what is wrong, and that it says it in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest import cli


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("palimpsest: error: ")
    return lines[0]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


def test_help_and_the_package_import_nothing_heavy():
    code = (
        "import sys, palimpsest, palimpsest.cli as cli; cli.main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'ray', 'tyro'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names_resolve():
    import palimpsest

    for name in palimpsest.__all__:
        assert getattr(palimpsest, name) is not None
    assert palimpsest.forget.NPO().beta == 0.1


def test_help_of_a_method_shows_its_hyper_parameters(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["forget", "npo", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--beta" in printed
    assert "--forget" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("forgt",), "did you mean forget"),
        (("forget", "npoo", "--model", "x"), "did you mean npo"),
        (("forget", "npo", "--model", "m", "--forget", "f", "--bta", "1"), "Perhaps you meant: --beta"),
        (("forget", "npo", "--model", "m"), "--forget"),
        (("forget", "npo", "--model", "m", "--forget", "f", "--beta", "x"), "--beta"),
        (("forget", "--model", "m"), "METHOD"),
        (("run", "--method", "nope"), "unknown forget method"),
        (("run", "--retain", "keep.jsonl"), "--forget"),
        (("run", "--forget", "missing.jsonl"), "missing.jsonl"),
        (("reproduce",), "--all"),
        (("reproduce", "mus"), "muse"),
        (("papers", "--verb", "forgit"), "did you mean forget"),
        (("verify",), "one folder"),
        (("compare", "forget", "--methods", ","), "no forget method"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in failing(capsys, *arguments)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []  # nothing half-written


def test_bad_records_name_file_and_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("keep.jsonl").write_text('{"text": "fine"}\n')
    assert "broken.jsonl:2" in failing(capsys, "run", "--forget", "broken.jsonl", "--retain", "keep.jsonl")
    assert "overlap" in failing(capsys, "run", "--forget", "keep.jsonl", "--retain", "keep.jsonl")


def test_a_model_folder_without_weights_or_with_pickles_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text('{"text": "must go"}\n')
    Path("empty").mkdir()
    assert "empty" in failing(capsys, "run", "--forget", "f.jsonl", "--model", "empty")
    Path("pickled").mkdir()
    Path("pickled/config.json").write_text('{"model_type": "gpt2"}')
    Path("pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "safetensors" in failing(capsys, "run", "--forget", "f.jsonl", "--model", "pickled")


def test_an_interruption_is_one_line_and_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt("stopped after step 3 of 9; run the same again to go on from here")

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert cli.main(["run"]) == 130
    assert "go on from here" in capsys.readouterr().err


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device", "/out/model.safetensors")

    monkeypatch.setattr(cli, "_dispatch", full)
    assert cli.main(["run"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_papers_prints_the_catalogue(capsys):
    assert cli.main(["papers", "--verb", "audit"]) == 0
    assert "muse" in capsys.readouterr().out


def test_warnings_and_log_lines_are_one_line_each_without_a_place_in_the_code():
    program = (
        "import logging, warnings; from palimpsest import cli; cli._speak_plainly();"
        "warnings.warn('two\\nlines', stacklevel=1); logging.getLogger('palimpsest.forget.eco').warning('no gate')"
    )
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["palimpsest: note: two lines", "palimpsest: note: no gate"]
