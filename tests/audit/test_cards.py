import pytest

from palimpsest.audit.cards import CARDS, card

CONTRACT = (
    "verbatim",
    "knowledge",
    "privacy_leakage",
    "utility",
    "retain_knowledge",
    "scalability",
    "sustainability",
    "forget_nll",
    "utility_nll",
    "gibberish",
    "utility_gibberish",
    "utility_verbatim",
)


@pytest.mark.parametrize("name", CONTRACT)
def test_every_measurement_has_a_whole_card(name):
    found = card(name)
    assert found.name == name
    texts = (found.title, found.meaning, found.direction, found.reference, found.source, found.needs)
    assert all(text.strip() for text in texts)
    assert found.meaning.endswith(".")
    assert found.direction.endswith(".")
    assert found.needs_records > 0
    low, high = found.range
    assert low is not None
    assert high is None or low < high


def test_every_measurement_of_the_six_way_audit_has_a_card():
    from palimpsest.audit.marks import NEEDS

    assert set(NEEDS) <= set(CARDS)


def test_an_unknown_measurement_gets_a_card_that_claims_nothing():
    found = card("bits_per-byte")
    assert found.title == "Bits per byte"
    assert found.range == (None, None)
    assert found.needs_records == 0
    assert "No description" in found.meaning
    assert "bits_per-byte" not in CARDS


def test_ranges_in_words():
    assert card("knowledge").range_text == "0 to 100"
    assert card("privacy_leakage").range_text == "-100 and up %"
    assert card("forget_nll").range_text == "0 and up nats per token"
    assert card("anything").range_text == "any number"


def test_a_hundred_records_bound_the_interval_of_any_0_to_100_score_to_ten_points():
    widest = 1.96 * 50 / card("knowledge").needs_records ** 0.5  # half the scores 0, half 100
    assert widest < 10
