import numpy as np
import pytest
from tests.curate.conftest import rows_of, write_lines

from palimpsest.core.errors import InputError
from palimpsest.curate import DSIR, run
from palimpsest.curate.dsir import hashed


def test_the_ratio_by_hand(tmp_path):
    write_lines(tmp_path / "target.jsonl", [{"text": "cat cat"}])
    write_lines(tmp_path / "pool.jsonl", [{"text": "cat"}, {"text": "dog"}, {"text": "dog"}, {"text": None}])
    method = DSIR(target=str(tmp_path / "target.jsonl"), buckets=1000)
    assert len(set(hashed("cat dog", 1000)) | set(hashed("cat cat", 1000))) == 4  # no collisions here
    result = run(method, tmp_path / "pool.jsonl", tmp_path / "out", workers=1, progress="")
    cat, dog = (np.log((t + 1) / 1003 / ((p + 1) / 1003)) for t, p in ((2, 1), (0, 2)))
    scores = [row["score_dsir"] for row in rows_of(tmp_path / "out")]
    assert scores == pytest.approx([cat, dog, dog, 0])
    assert result.notes["numbers"]["mean"] == pytest.approx(np.mean(scores))


def test_documents_like_the_target_score_higher(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [["red", "dog", "runs"], ["bank", "rate", "rises"]]
    rows = [{"kind": kind, "text": " ".join(rng.choice(kinds[kind], 8))} for kind in rng.integers(2, size=200).tolist()]
    write_lines(tmp_path / "pool.jsonl", rows)
    write_lines(tmp_path / "target.jsonl", [{"text": "the red dog runs"}] * 20)
    run(DSIR(target=str(tmp_path / "target.jsonl")), tmp_path / "pool.jsonl", tmp_path / "out", workers=1, progress="")
    found = rows_of(tmp_path / "out")
    assert min(row["score_dsir"] for row in found if row["kind"] == 0) > max(
        row["score_dsir"] for row in found if row["kind"] == 1
    )
    with pytest.raises(InputError, match="wanted target"):
        run(DSIR(), tmp_path / "pool.jsonl", tmp_path / "none", workers=1, progress="")
