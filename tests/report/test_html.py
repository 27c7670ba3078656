import re
from html.parser import HTMLParser

import pytest

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report import html
from palimpsest.report.parts import overlap

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert(1)</script> & \"quoted\" 'single' {{ 7*7 }}"


class Page(HTMLParser):
    """The page as a browser takes it: which tags there are, and whether they nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def written(evidence, folder) -> str:
    return html.write(evidence, folder).read_text(encoding="utf-8")


def test_a_whole_report(make_evidence, tmp_path):
    text = written(make_evidence(), tmp_path)
    page = Page(text)
    assert page.open == []
    assert "Forgotten, and the rest is kept." in text
    told = " ".join(page.words)
    for expected in (
        "Verbatim memorisation",
        "criterion C3",
        "Where was Odalys Brennan born?",
        "beta",
        "2.13.0",
        "41.7 s",
    ):
        assert expected in told


def test_it_asks_nothing_of_the_network_and_runs_nothing(make_evidence, tmp_path):
    text = written(make_evidence(), tmp_path)
    page = Page(text)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("iframe")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert all(attrs.get("href", "#").startswith("#") for attrs in page.all("a"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"\bsrc=", text)


def test_markup_in_data_is_shown_and_not_run(make_evidence, tmp_path):
    example = {"set": EVIL, "prompt": EVIL, "truth": EVIL, "before": EVIL, "after": EVIL, "reference": EVIL}
    evidence = make_evidence(
        name=EVIL,
        config={EVIL: EVIL},
        verdict=EVIL,
        examples=[example],
        curves={EVIL: [2.0, 1.0]},
        table=[{EVIL: EVIL, "n": 1.5}],
    )
    evidence.environment[EVIL] = EVIL
    evidence.data[EVIL] = {"rows": EVIL and 3, "sha256": EVIL}
    text = written(evidence, tmp_path)
    page = Page(text)
    assert page.open == []
    assert not page.all("script")
    assert "<script" not in text
    assert "{{ 7*7 }}" in " ".join(page.words)
    assert " ".join(page.words).count("<script>alert(1)</script>") > 8


def test_every_table_has_a_caption_and_scoped_headers_and_ids_are_unique(make_evidence, tmp_path):
    page = Page(written(make_evidence(table=[{"method": "npo", "knowledge": 20.0}]), tmp_path))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in attrs for attrs in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    pictures = [attrs for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert len(pictures) == 6 + 2 + 1  # six ways, two courses, one loss curve
    assert all(set(attrs["aria-labelledby"].split()) <= set(ids) for attrs in pictures)


def test_what_each_screen_of_a_filter_stops_is_shown(make_evidence, tmp_path):
    html = written(make_evidence(filters=[{"screen": "names", "benign": 0.0, "definition": 12.5}]), tmp_path)
    shown = html.split('<h2 id="filters"')[1].split("</section>")[0]
    assert "names" in shown
    assert "12.5" in shown
    assert 'id="table"' not in html


def test_numbers_of_the_picture_stand_in_the_table(make_evidence, tmp_path):
    evidence = make_evidence()
    table = written(evidence, tmp_path).split('<table class="measurements"')[1].split("</table>")[0]
    for shown in ("99.2", "24.9", "26.3", "−97.8", "−7.2", "−19.0 to 5.1", "88.9", "75.9", "3.42"):
        assert shown in table


def test_numbers_of_courses_and_attacks_stand_in_tables(make_evidence, tmp_path):
    text = written(make_evidence(), tmp_path)
    for shown in (
        "89.5",
        "75.9",
        "<td>0.452</td>",
        "Scores after each request: Sustainability",
        "in the words of the records",
    ):
        assert shown in text
    assert "Request by request" not in written(make_evidence(requests={}, membership={}), tmp_path)


def test_missing_ways_say_what_they_need(tmp_path):
    only = Measurement("knowledge", "forget", 90.0, 20.0, None, 15.0, 25.0, 40, "reference")
    text = written(Evidence("forget", (only,), {"name": "npo"}, {}, {}, environment={}), tmp_path)
    assert text.count("Not measured. Needs") == 5
    assert "holdout records that no model has seen" in text
    assert "few" in text


def test_evidence_of_another_verb_shows_its_own_measurements(tmp_path):
    accuracy = Measurement("accuracy", "task", 0.5, 0.8, None, 0.7, 0.9, 40, "higher")
    text = written(Evidence("learn", (accuracy,), {"name": "maml"}, {}, {}, environment={}), tmp_path)
    assert "Accuracy" in text
    assert "Privacy leakage" not in text
    assert "learn report" in text


def test_empty_evidence_is_a_page_too(tmp_path):
    text = written(Evidence("curate", (), {}, {}, {}, environment={}), tmp_path)
    assert "Nothing was measured." in text
    assert Page(text).open == []


def test_it_stays_under_a_megabyte(make_evidence, tmp_path):
    long = "word " * 2000
    example = {"set": "forget", "prompt": long, "truth": long, "before": long, "after": long, "reference": long}
    text = written(
        make_evidence(
            examples=[example] * 300 + [{**example, "set": "utility"}] * 300,
            curves={f"run {i}": [1.0 / (1 + step) for step in range(20_000)] for i in range(30)},
            table=[{"method": long, "value": i} for i in range(2000)],
        ),
        tmp_path,
    )
    assert len(text.encode()) < 1_000_000
    assert "560 more are in evidence.json" in text
    assert "1800 more rows are in evidence.json" in text


def test_every_set_of_examples_is_shown(make_evidence, tmp_path):
    examples = [{"set": f"set {i % 3}", "prompt": "p", "truth": "t", "after": "a"} for i in range(120)]
    text = written(make_evidence(examples=examples), tmp_path)
    assert all(f">set {i}</h3>" in text for i in range(3))


def test_runs_are_shown_side_by_side(make_evidence, tmp_path):
    runs = [make_evidence("npo").to_json(), make_evidence("sim-npo", knowledge=50.0).to_json()]
    text = written(make_evidence(runs=runs), tmp_path)
    assert "Several runs" in text
    assert "sim-npo" in text
    with pytest.raises(InputError, match=r"extras\.runs"):
        html.write(make_evidence(runs=[{"measurements": [{"nonsense": 1}]}]), tmp_path)


def test_a_surrogate_from_a_model_does_not_stop_the_report(make_evidence, tmp_path):
    example = {"set": "forget", "prompt": "p", "truth": "t", "after": "half \ud83d", "before": "\x00\x07"}
    assert "half ?" in written(make_evidence(examples=[example]), tmp_path)


def test_light_dark_and_paper(make_evidence, tmp_path):
    style = written(make_evidence(), tmp_path).split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    colours = {name: set(re.findall(r"--(\w+): #", block)) for name, block in (("light", light), ("dark", dark))}
    assert colours["light"] == colours["dark"]
    used = set(re.findall(r"var\(--(\w+)\)", written(make_evidence(), tmp_path)))
    assert used <= set(re.findall(r"--(\w+):", style))


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_stands_out_from_the_paper(make_evidence, tmp_path, scheme):
    """WCAG 2.2: contrast of at least 4.5 for text and 3 for graphics."""
    style = written(make_evidence(), tmp_path).split("<style>")[1]
    block = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})\b", block))

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(name: str) -> float:
        a, b = sorted((luminance(colours[name]), luminance(colours["paper"])))
        return (b + 0.05) / (a + 0.05)

    assert all(contrast(name) >= 4.5 for name in ("ink", "muted", "after", "good", "mixed", "bad", "unknown"))
    assert all(contrast(name) >= 3 for name in ("before", "reference"))


def test_overlap_marks_words_in_order():
    assert overlap("She was born in Rome.", "He was born in rome") == [("She ", False), ("was born in Rome.", True)]
    assert overlap("b a", "a b") in ([("b", True), (" a", False)], [("b ", False), ("a", True)])
    assert overlap("", "a") == []
    assert overlap("was born ... there", "was born there") == [("was born", True), (" ... ", False), ("there", True)]


def test_overlap_keeps_the_text():
    text = "  One two,\n three  four. five"
    assert "".join(piece for piece, _ in overlap(text.strip(), "two three six five")) == text.strip()
