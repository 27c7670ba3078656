import pytest

from palimpsest import catalog, claims
from palimpsest.core.errors import InputError

BODY = """
@claim(**settings())
def measure(seed, mechanism=True, scale=1.0):
    return {"a": 1.0, "b": 0.0}
"""


def test_the_claim_of_a_paper_is_found_by_its_slug(paper_claims):
    paper_claims(muse=BODY)
    assert "muse" in claims.slugs()
    assert claims.get("MUSE").paper == "muse"
    assert claims.discover()["muse"] is claims.get("muse")


def test_papers_and_claims_make_up_the_catalogue():
    slugs = [paper.slug for paper in catalog.papers()]
    assert sorted(claims.slugs() + claims.without_claim()) == sorted(slugs)


def test_helper_modules_are_no_claims():
    assert not {"definition", "runner", "results", "discovery"} & set(claims.slugs())


def test_an_unknown_paper_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="unknown paper 'meta_slq': did you mean metasql"):
        claims.get("meta_slq")


def test_a_paper_without_a_claim_is_said_to_have_none(monkeypatch):
    monkeypatch.setattr("palimpsest.claims.discovery.slugs", lambda: ["muse"])
    with pytest.raises(InputError, match="'whp' has no claim yet; papers with one: muse"):
        claims.get("whp")


@pytest.mark.parametrize("body", ["", BODY.replace("settings()", 'settings(paper="eco")'), BODY + "other = measure\n"])
def test_a_module_holds_one_claim_of_its_own_paper(paper_claims, body):
    paper_claims(muse=body)
    with pytest.raises(claims.ClaimError, match="must hold one claim, of the paper 'muse'"):
        claims.get("muse")
