import re

import yaml
from huggingface_hub import ModelCard

from palimpsest.report import card
from palimpsest.report.card import markdown


def test_the_hub_reads_back_what_was_measured(make_evidence, tmp_path):
    evidence = make_evidence(leakage=None)
    path = card.write(evidence, tmp_path)
    assert path == tmp_path / "README.md"
    read = ModelCard.load(path)
    found = {result.metric_type: result for result in read.data.eval_results}
    measured = {m.name: m.after for m in evidence.measurements if m.after is not None}
    assert {name: result.metric_value for name, result in found.items()} == measured
    assert "privacy_leakage" not in found
    assert found["knowledge"].dataset_config == "forget"
    assert found["knowledge"].dataset_args == {"sha256": evidence.data["forget"]["sha256"]}
    assert found["utility"].dataset_config == "utility"
    assert read.data.library_name == "transformers"
    assert {"palimpsest", "machine-unlearning", "npo"} <= set(read.data.tags)
    assert "base_model" not in read.data.to_dict()


def test_a_hub_model_is_named_as_the_base_and_a_local_one_is_not(make_evidence, tmp_path, monkeypatch):
    evidence = make_evidence()
    evidence.model["before"]["source"] = "some-org/some-model"
    assert ModelCard.load(card.write(evidence, tmp_path)).data.base_model == "some-org/some-model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org" / "some-model").mkdir(parents=True)
    assert ModelCard.load(card.write(evidence, tmp_path)).data.base_model is None


def test_text_of_others_stays_text(make_evidence, tmp_path):
    evil = "a | b\n---\n# <script>x</script> `c` [l](http://e)"
    evidence = make_evidence(evil, config={evil: evil})
    text = card.write(evidence, tmp_path).read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "<script>" not in body
    assert not re.search(r"(?<!\\)\]\(", body)
    rows = [re.sub(r"\\.", "", line) for line in body.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {7, 4}
    assert ModelCard.load(tmp_path / "README.md").data.eval_results


def test_nothing_measured_is_a_card_too(tmp_path):
    from palimpsest.core.records import Evidence

    path = card.write(Evidence("forget", (), {"name": "npo"}, {}, {}, environment={}), tmp_path)
    assert ModelCard.load(path).data.eval_results is None
    assert "Nothing was measured" in path.read_text(encoding="utf-8")


def test_markdown_escapes():
    assert markdown("a|b_c*d\n<e>") == "a\\|b\\_c\\*d &lt;e&gt;"
