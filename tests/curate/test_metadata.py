import gzip

import pytest
from tests.curate.conftest import write_lines

from palimpsest.core.errors import InputError
from palimpsest.curate import metadata


def test_lists_are_read_and_twins_merged(tmp_path):
    (tmp_path / "a.txt").write_text("dog\n\nNew\tYork\nNew York\ndog\nCafé\n")
    assert metadata.load(tmp_path / "a.txt") == ["dog", "New\tYork", "Café"]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'["dog", "cat"]'))
    assert metadata.load(tmp_path / "a.json.gz") == ["dog", "cat"]
    metadata.save(["x", "y z"], tmp_path / "b.txt")
    assert metadata.load(tmp_path / "b.txt") == ["x", "y z"]


def test_a_list_from_the_papers_kinds_of_sources(tmp_path):
    (tmp_path / "index.noun").write_text("  1 licence text\nbig_dog n 1 0 @ 1 0 02084071\ncat n 1 0\n")
    (tmp_path / "unigrams.tsv").write_text("the\t900\n,\t900\nrare\t99\nCat\t100\n")
    (tmp_path / "bigrams.tsv").write_text("Hong Kong\t31.5\nof the\t2\n")
    (tmp_path / "titles.tsv").write_text("Barack Obama\t7000\nSome Stub\t3\n")
    names = {"lemmas": "index.noun", "unigrams": "unigrams.tsv", "bigrams": "bigrams.tsv", "titles": "titles.tsv"}
    entries = metadata.build(**{key: tmp_path / name for key, name in names.items()})
    numbers = [str(number) for number in range(100)]
    assert entries == ["big dog", "cat", *numbers, "the", "Cat", "Hong Kong", "Barack Obama"]
    assert metadata.build(unigrams=tmp_path / "unigrams.tsv", limit=5) == numbers[:5]


def test_a_list_from_the_pools_own_text(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "hong kong is hot, hot"}] * 30)
    write_lines(tmp_path / "b.jsonl", [{"text": f"is it? {'w' * (n % 7)}"} for n in range(40)] + [{"text": None}])
    found = metadata.from_pool(tmp_path, unigram_count=30, bigram_count=30, bigram_pmi=2.3)
    assert found == ["is", "hot", "it", "hong", "kong", "hong kong"]
    # of 334 words: "hong kong" log2(30 * 334 / (30 * 30)) = 3.5, "is it" log2(40 * 334 / (70 * 40)) = 2.25
    with pytest.raises(InputError, match="no word of the pool is seen 100 times"):
        metadata.from_pool(tmp_path)


def test_bad_lists(tmp_path):
    for name, content, message in [
        ("a.txt", b"\n \n", "empty"),
        ("b.txt", b"\xff\xfe", "not UTF-8"),
        ("c.json", b"[1]", "wanted a list of strings"),
        ("d.json", b"[", "d.json:1: not valid JSON"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            metadata.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        metadata.load(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="at least one of"):
        metadata.build()
    (tmp_path / "e.tsv").write_text("the 900\n")
    with pytest.raises(InputError, match=r"e.tsv:1: found 'the 900'; wanted 'entry TAB number'"):
        metadata.build(unigrams=tmp_path / "e.tsv")
