import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.curate import matching
from palimpsest.curate.matching import Matcher, pattern, spaced


def naive(entries: list[str], texts: list[str | None]) -> list[list[int]]:
    return [[number for number, entry in enumerate(entries) if pattern(entry) in spaced(text or "")] for text in texts]


def match(entries: list[str], texts: list[str | None]) -> list[list[int]]:
    return Matcher(entries)(pa.array(texts, pa.string())).to_pylist()


def test_spacing_is_the_official_codes():
    assert spaced("a dog, U.S.\tx") == " a dog ,  U . S .  x "


@pytest.mark.parametrize(
    ("entry", "text", "found"),
    [
        ("art", "a party", False),
        ("art", "modern art", True),
        ("art", "art!", True),
        ("art", "Art", False),
        ("art", "art-deco", False),
        ("U.S.", "in the U.S. today", True),
        ("U.S.", "the U.S.A", False),
        ("new york", "new york,", True),
        ("new york", "new  york", False),
        ("new york", "new\nyork", True),
        ("a b a", "a b a b a", True),
        ("x", "", False),
        ("internationalisation", "internationalisation of x", True),
        ("internationalisatio", "internationalisation of x", False),
        ("犬", "白い犬です", True),
        ("หมา", "หมาสีขาว", True),
        ("é", "caf é", True),
        ("nul\0l", "a nul\0l b", True),
        ("nul", "nul\0", False),
    ],
)
def test_borders(entry, text, found):
    assert match([entry], [text]) == [[0]] * found + [[]] * (not found)
    assert naive([entry], [text]) == match([entry], [text])


WORDS = st.sampled_from(["a", "b", "ab", "dog", "longerthan8", "longerthan8bytes", "é", "犬", "", "\0"])
GLUE = st.sampled_from([" ", "  ", ",", ". ", "\n", "\t", "`", "-"])


@st.composite
def phrase(draw: st.DrawFn, most: int) -> str:
    words = draw(st.lists(WORDS, min_size=1, max_size=most))
    return "".join(word + draw(GLUE) for word in words[:-1]) + words[-1]


@settings(max_examples=200, deadline=None)
@given(st.lists(phrase(3), min_size=1, max_size=8), st.lists(st.none() | phrase(9), max_size=12), st.integers(1, 80))
def test_equals_the_definition(entries, texts, chunk):
    entries = list({pattern(entry): entry for entry in entries if entry.strip()}.values())
    if not entries:
        return
    before, matching._CHUNK = matching._CHUNK, chunk  # so that chunks of a few texts are seen as well
    try:
        assert match(entries, texts) == naive(entries, texts)
    finally:
        matching._CHUNK = before


def test_many_entries_and_texts_of_a_sliced_array():
    entries = [f"w{n}" for n in range(5000)] + [f"w{n} w{n + 1}" for n in range(0, 5000, 3)]
    texts = pa.array([f"w{n}, w{n} w{n + 1} q w{n * 7}" for n in range(1000)])
    assert Matcher(entries)(texts.slice(400, 50)).to_pylist() == naive(entries, texts.slice(400, 50).to_pylist())


def test_bad_lists():
    with pytest.raises(InputError, match="empty"):
        Matcher([])
    with pytest.raises(InputError, match="entry 2 of the list is blank"):
        Matcher(["dog", " "])
    with pytest.raises(InputError, match="entries 1 and 3 of the list match the same texts"):
        Matcher(["a\tb", "c", "a b"])
