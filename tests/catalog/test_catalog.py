import re
from pathlib import Path

import pytest

from palimpsest import catalog
from palimpsest.core.errors import InputError
from palimpsest.core.methods import VERBS

PAPERS = catalog.papers()
each_paper = pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)


@pytest.fixture(scope="module")
def sheets():
    """The notes on the papers, which lie beside a development checkout."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "papers"
    if not folder.is_dir():
        pytest.skip("the notes on the papers are not here")
    return folder


def test_every_slug_and_every_arxiv_number_comes_once():
    assert len(PAPERS) == 58
    assert len({paper.slug for paper in PAPERS}) == 58
    numbers = [paper.arxiv for paper in PAPERS if paper.arxiv]
    assert len(set(numbers)) == len(numbers) >= 57


@each_paper
def test_a_row_is_complete(paper):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", paper.slug)
    assert paper.title
    assert paper.short
    assert paper.verb in VERBS
    assert paper.tags
    assert paper.claim.endswith(".")
    assert re.search(r"\d|[Nn]o number", paper.headline), "a number, or a word that there is none"
    assert paper.authors is None or 1 <= paper.authors <= 100


@each_paper
def test_a_date_is_that_of_the_arxiv_number(paper):
    assert paper.year >= 2000
    assert 1 <= paper.month <= 12
    if paper.arxiv:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        assert paper.arxiv.startswith(f"{paper.year % 100:02d}{paper.month:02d}.")


@each_paper
def test_a_paper_stands_in_the_room_of_its_verb_under_its_slug(paper):
    rooms = {module.split("/")[0] for module in paper.modules}
    assert paper.verb in rooms <= set(VERBS)
    assert all(module.endswith(".py") for module in paper.modules)
    if paper.slug != "knowledge_unlearning":  # a survey: its methods have files of their own
        assert {Path(module).stem for module in paper.modules} == {paper.slug}


def test_the_catalogue_agrees_with_the_notes(sheets):
    """Slugs, verbs and modules are those of the notes' table; every sheet has its row."""
    rows = {}
    for line in (sheets / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 5 and "/" in cells[3] and cells[2] in VERBS:
            names = re.findall(r"[\w/]+\.py", cells[3])
            room = names[0].rsplit("/", 1)[0]
            rows[cells[0]] = (cells[2], tuple(name if "/" in name else f"{room}/{name}" for name in names))
    assert {paper.slug: (paper.verb, paper.modules) for paper in PAPERS} == rows
    assert {path.stem for path in sheets.glob("*.md")} - {"README"} <= set(rows)


def test_the_numbers_of_a_headline_are_in_its_sheet(sheets):
    """No number is invented: each stands in the sheet it was taken from (or in the sheet's own sum of the parts)."""
    for paper in PAPERS:
        sheet = sheets / f"{paper.slug}.md"
        if sheet.exists():
            text = sheet.read_text(encoding="utf-8").replace(",", "")
            missing = [number for number in numbers_of(paper.headline) if not found(number, text)]
            assert not missing, f"{paper.slug}: {missing}"


def numbers_of(headline):
    """The decimal numbers of a headline, which are its results (whole numbers are sizes and names)."""
    return re.findall(r"(?<![\w.-])\d+\.\d+(?!\w|\.\d)", headline.replace(",", ""))


def found(number, text):
    return re.search(rf"(?<!\d){re.escape(number.removeprefix('0'))}(?!\d)", text) or number in text


def test_get_finds_a_paper_and_suggests_the_nearest():
    assert catalog.get("Skill-Unlearning").arxiv == "2503.21730"
    assert catalog.get("whp").url == "https://arxiv.org/abs/2310.02238"
    with pytest.raises(InputError, match="unknown paper 'deep_unlearning': did you mean"):
        catalog.get("deep_unlearning")


def test_the_list_is_the_callers_own():
    catalog.papers().clear()
    assert catalog.papers() == PAPERS
