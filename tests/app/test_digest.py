"""The digest: what is new since a day, verdicts that moved first, nothing before it, nothing as markup."""

from __future__ import annotations

from datetime import date

from palimpsest.app.digest import digest
from palimpsest.app.standing import standings
from palimpsest.cli import main


def test_a_moved_verdict_is_told_with_what_it_was(results):
    found = digest(standings(results), date(2026, 11, 24))
    (change,) = found.changes
    assert change.paper.slug == "muse"
    assert change.words == "fails, was holds"
    assert found.title == "palimpsest: 1 result since 2026-11-24, 1 new or changed verdict"
    assert "  a - b >= 2: 3 (2 to 4), fails" in found.text()


def test_a_first_result_and_a_later_day(results):
    first = digest(standings(results), date(2026, 8, 1))
    assert [change.words for change in first.changes] == [
        "fails, measured for the first time",
        "holds, measured for the first time",
    ]
    later = digest(standings(results), date(2026, 11, 25))
    assert later.changes == ()
    assert "no new or changed verdicts" in later.title
    assert "Nothing was measured" in later.html()


def test_papers_that_came_out_since_are_named(results):
    assert [paper.slug for paper in digest(standings(results), date(2025, 10, 1)).papers]
    assert digest(standings(results), date(2026, 11, 1)).papers == ()


def test_the_command_prints_or_writes(results, tmp_path, capsys):
    arguments = ["digest", "--since", "2026-11-01", "--results", str(results)]
    assert main(arguments) == 0
    assert "MUSE (muse): fails" in capsys.readouterr().out
    out = tmp_path / "mail.html"
    assert main([*arguments, "--html", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<div>")
    assert "a - b &gt;= 2" in text
    assert main(["digest", "--since", "yesterday", "--results", str(results)]) == 2
    assert "wanted a day as YYYY-MM-DD" in capsys.readouterr().err
