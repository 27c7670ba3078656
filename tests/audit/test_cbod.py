"""C-BOD on models whose truth is known: one that knows the answers, one that knows the wording."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.audit.cards import CARDS
from palimpsest.audit.cbod import CBOD
from palimpsest.audit.choices import Item
from palimpsest.audit.mcnemar import Paired
from palimpsest.cli import main
from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.models.lm import LM
from palimpsest.report.verdict import verdict

OPTIONS = ("jade", "opal", "ruby", "onyx")


def item(number: int) -> Item:
    return Item(f"Which stone belongs to number {number}?", OPTIONS, number % 4, f"part {number % 2}", number)


ITEMS = [item(number) for number in range(1, 81)]
ASKED = {one.prompt(one.question) for one in ITEMS}


def right(prompt: str, option: str) -> list[float]:
    number = int("".join(letter for letter in prompt if letter.isdigit()))
    return [0.0 if option.strip() == OPTIONS[number % 4] else -1.0]


def by_heart(prompt: str, option: str) -> list[float]:
    """Right on the benchmark's own wording; on another, half of the items are lost."""
    number = int("".join(letter for letter in prompt if letter.isdigit()))
    known = prompt in ASKED or number % 2
    return right(prompt, option) if known else [0.0 if option.strip() == OPTIONS[(number + 1) % 4] else -1.0]


def say(questions, mu, seed):
    return [f"{text[:-1]}, in draw {'abcdefghij'[seed % 10]}?" for text in questions]


def test_skill_is_not_flagged_and_its_power_is_stated(scripted):
    found = CBOD()(scripted(score=right), ITEMS, say)
    assert found.extras["outcome"] == "not flagged"
    assert found["reworded_accuracy"].before == found["reworded_accuracy"].after == 100
    assert found["wording_drop"].low < 0 == found["wording_drop"].after < found["wording_drop"].high
    paired = Paired(np.ones(80), np.ones(80))
    assert f"{paired.power(0.05):.0%}" in found.extras["verdict"]
    assert f"it takes {paired.needed(0.05)} items" in found.extras["verdict"] or paired.power(0.05) >= 0.8


def test_a_score_learned_by_heart_is_flagged(scripted):
    audit = CBOD(grid=(0.5,))
    found = audit(scripted(score=by_heart), ITEMS, say)
    assert found.extras["outcome"] == "flagged"
    assert found["wording_drop"].after == pytest.approx(50)
    assert found["wording_drop"].low > 35
    assert found["wording_effect"].after == 0.5
    assert found["wording_drop_relative"].after == pytest.approx(50)
    assert found["wording_noise"].after == 0
    rows = found.extras["table"]
    assert [row["items"] for row in rows] == ["all", "all", "part 0", "part 1"]
    assert [row["drop"] for row in rows[2:]] == pytest.approx([100, 0])
    assert rows[0]["p"] == pytest.approx(2 * Paired(np.ones(80), np.repeat([0.0, 1.0], 40)).p)  # Holm over two
    shown = found.extras["examples"]
    assert len(shown) == audit.examples
    assert {one["set"] for one in shown} == {"lost by rewording"}
    assert verdict(found).level == "bad"
    for m in found.measurements:
        assert m.name in CARDS
        assert m.low <= m.after <= m.high


def test_a_model_that_guesses_is_underpowered_whatever_its_p(scripted):
    found = CBOD()(scripted(score=lambda prompt, option: [0.0]), ITEMS, say)
    assert found.extras["outcome"] == "underpowered"
    assert found.extras["verdict"].startswith("Underpowered: the model answers 25.0%, guessing 25.0%")


def test_doing_better_on_the_rewording_is_not_flagged(scripted):
    turned = scripted(
        score=lambda prompt, option: (
            [1.0 if option == " onyx" else 0.0]
            if prompt in ASKED and int("".join(filter(str.isdigit, prompt))) % 2
            else right(prompt, option)
        )
    )
    found = CBOD()(turned, ITEMS, say)
    assert found["wording_drop"].high < 0
    assert found.extras["outcome"] == "not flagged"


def test_the_shipped_rewriter_and_the_same_answer_twice(scripted):
    lm = scripted(score=right)
    first, again = (CBOD(mu=1.5)(lm, ITEMS).to_json() for _ in range(2))
    for value in (first, again):
        del value["seconds"]
    assert first == again
    assert first["data"]["reworded"]["rows"] > 70


def test_items_that_cannot_be_reworded_leave_both_sides(scripted):
    def partly(questions, mu, seed):
        return [
            text if "number 1" in text else new for text, new in zip(questions, say(questions, mu, seed), strict=True)
        ]

    found = CBOD()(scripted(score=right), ITEMS, partly)
    assert found["reworded_accuracy"].n == 80 - 11
    assert "11 items without a good rewording left out of both sides (22 unchanged)" in found.extras["asked"]


def test_too_few_items_say_how_many_it_takes(scripted):
    lm = scripted(score=right)
    with pytest.raises(InputError, match=r"5 items are too few.* needs at least 6, and about 626 to see a drop of 5"):
        CBOD()(lm, ITEMS[:5], say)
    with pytest.raises(InputError, match=r"0 of 80 items could be reworded at mu 1 \(160 unchanged\)"):
        CBOD()(lm, ITEMS, lambda questions, mu, seed: questions)


@pytest.mark.parametrize(
    "settings",
    [{"mu": -1.0}, {"grid": (-0.1,)}, {"alpha": 0.0}, {"drop": 0.0}, {"samples": -1}, {"base_url": "http://x"}],
)
def test_bad_settings(settings):
    with pytest.raises(InputError):
        CBOD(**settings)


def test_a_rephraser_that_is_not_there(scripted):
    with pytest.raises(InputError, match="nowhere: no such model folder"):
        CBOD(rephraser="nowhere")(scripted(score=right), ITEMS)


def test_the_command_ends_in_a_proof_that_can_be_re_run(tmp_path, capsys):
    rows = [{"question": one.question, "choices": list(OPTIONS), "answer": one.right} for one in ITEMS[:40]]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    LM.build([one.question for one in ITEMS], "llama-tiny", vocab_size=300, max_length=96).save(tmp_path / "model")
    arguments = ["audit", "cbod", "--model", str(tmp_path / "model"), "--benchmark", str(tmp_path / "b.jsonl")]
    assert main([*arguments, "--mu", "1.5", "--grid", "0.5", "1.0", "--out", str(tmp_path / "out")]) == 0
    found = Evidence.read(tmp_path / "out")
    assert found.extras["audit"]["config"]["grid"] == [0.5, 1.0]
    assert {row["mu"] for row in found.extras["table"]} == {1.5, 0.5, 1.0}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Points lost by rewording" in page
    assert found.extras["verdict"].split(":")[0] in page
    assert main(["verify", str(tmp_path / "out"), "--rerun"]) == 0
    capsys.readouterr()
    assert main([*arguments[:-1], str(tmp_path / "none.csv")]) == 2
    assert "none.csv: no such file" in capsys.readouterr().err


def test_real_questions_go_through_the_same_way(dev_data, scripted):
    from palimpsest.audit.choices import read_items

    items = read_items(dev_data / "mmlu/dev.jsonl.gz")
    lm = scripted(score=lambda prompt, option: [float(len(option) % 7)])
    found = replace(CBOD(), by="sum")(lm, items)
    assert found["reworded_accuracy"].n > 100
    assert found["wording_drop"].after == 0  # such a model does not read the question
