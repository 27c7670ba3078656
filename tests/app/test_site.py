"""The static site: all pages are there and lead to each other, nothing is fetched, nothing is executed from data."""

from __future__ import annotations

import re

import pytest

from palimpsest import catalog
from palimpsest.app import site
from palimpsest.cli import main
from palimpsest.core.errors import InputError


@pytest.fixture
def folder(results, tmp_path):
    return site.write(tmp_path / "site", results).parent


def test_every_paper_has_a_page_that_the_index_leads_to(folder):
    index = (folder / "index.html").read_text(encoding="utf-8")
    for paper in catalog.papers():
        assert f'href="papers/{paper.slug}.html"' in index
        assert 'href="../index.html"' in (folder / "papers" / f"{paper.slug}.html").read_text(encoding="utf-8")
    assert 'data-verdict="fails"' in index


def test_a_page_shows_the_claim_with_its_numbers_and_its_code(folder):
    text = (folder / "papers" / "muse.html").read_text(encoding="utf-8")
    for words in ("What is said.", "3 (2 to 4)", "not measured", "palimpsest reproduce muse", "class Muse", "40.5"):
        assert words in text
    assert text.count("<svg") == 3


def test_nothing_is_fetched_and_data_is_never_markup(folder):
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:link|script|img)[^>]+(?:src|href)=[\"'](?!data:)", text)
        assert "<script>alert" not in text
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))


def test_it_is_written_again_over_itself_and_over_nothing_else(folder, results, tmp_path):
    site.write(folder, results)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="wanted a new or empty folder"):
        site.write(tmp_path / "mine", results)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_the_command(results, tmp_path, capsys):
    assert main(["site", "--out", str(tmp_path / "s"), "--results", str(results)]) == 0
    assert (tmp_path / "s" / "index.html").exists()
    results.write_text("[]\n")
    assert main(["site", "--out", str(tmp_path / "t"), "--results", str(results)]) == 2
    assert not (tmp_path / "t").exists()
