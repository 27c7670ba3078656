"""The frozen model's numbers: right, in the table's order, computed once, and without a second model in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from palimpsest.core import losses, reference
from palimpsest.data.batches import Encoded

CONFIG = GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4)  # with dropout


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    rng = np.random.default_rng(0)
    return Encoded(tuple(rng.integers(3, 30, size=n) for n in (5, 9, 3, 7)), (1, 4, 3, 2), 0)  # row 2: nothing scored


def no_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(reference, "passes", fail)


def test_sequence_logprobs_are_in_the_tables_order(model: nn.Module, encoded: Encoded) -> None:
    found = reference.sequence_logprobs(model, encoded, "a")
    wanted = torch.cat([losses.sequence_logprobs(model, encoded.batch([row])) for row in range(4)])
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert found[2] == 0


def test_hidden_states_follow_any_choice_of_rows(model: nn.Module, encoded: Encoded) -> None:
    kept = reference.reference(model, encoded, "a")
    assert kept.states.offsets.tolist() == [0, 4, 9, 9, 14]
    for rows in ([1, 0, 3], [3, 3], [2, 1], [2]):
        batch = encoded.batch(rows)
        wanted, head = losses.hidden_states(model, batch)
        torch.testing.assert_close(kept.hidden(batch), wanted.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept.head(kept.hidden(batch)), head(wanted).detach(), rtol=1e-5, atol=1e-5)


def test_a_second_question_is_answered_from_disk(
    model: nn.Module, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference.reference(model, encoded, "a"), reference.sequence_logprobs(model, encoded, "a")
    no_more_passes(monkeypatch)
    again = reference.reference(model, encoded, "a"), reference.sequence_logprobs(model, encoded, "a")
    assert torch.equal(again[0].states.values, first[0].states.values)
    assert torch.equal(again[1], first[1])
    for other_model, other_table in (("b", encoded), ("a", encoded.select([0, 1]))):
        with pytest.raises(AssertionError, match="asked again"):
            reference.reference(model, other_table, other_model)


def test_a_broken_off_pass_leaves_nothing_behind(
    model: nn.Module, encoded: Encoded, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(losses, "hidden_states", break_off)
    with pytest.raises(KeyboardInterrupt):
        reference.reference(model, encoded, "a")
    monkeypatch.undo()
    monkeypatch.setenv("PALIMPSEST_CACHE", str(empty_cache))
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]
    assert reference.reference(model, encoded, "a").states.values.shape == (14, 32)


def test_dropout_is_off_and_the_models_mode_comes_back(model: nn.Module, encoded: Encoded) -> None:
    quiet = reference.sequence_logprobs(model, encoded, "a")
    model.train()
    assert torch.equal(reference.sequence_logprobs(model, encoded, "trained mode"), quiet)
    assert model.training
    model.eval()


def test_half_precision_stays_half(encoded: Encoded) -> None:
    torch.manual_seed(0)
    half = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    kept = reference.reference(half, encoded, "half")
    assert kept.states.values.dtype == torch.bfloat16
    full = AutoModelForCausalLM.from_config(CONFIG).eval()
    assert losses.kl(full, encoded.batch([0, 1]), kept).item() > 0  # bf16 reference under a float32 model


def test_the_head_is_the_models_own(model: nn.Module, encoded: Encoded) -> None:
    assert reference.reference(model, encoded, "a").head.__closure__ is not None  # type: ignore[attr-defined]
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(1))  # type: ignore[operator]
    kept = reference.reference(model, encoded, "a")
    seen.clear()
    kept.head(kept.hidden(encoded.batch([0])))
    hook.remove()
    assert seen == [1]


def test_a_table_with_nothing_to_score_is_empty(model: nn.Module) -> None:
    table = Encoded((np.array([5, 6]), np.array([7, 8, 9])), (2, 3), 0)
    kept = reference.reference(model, table, "a")
    assert kept.hidden(table.batch([0, 1])).shape == (0, 32)


def test_states_of_any_kind_are_kept_by_row(model: nn.Module, encoded: Encoded) -> None:
    def doubled(batch) -> Tensor:  # type: ignore[no-untyped-def]
        return 2.0 * batch.input_ids[batch.attention_mask.bool()][:, None].float()

    kept = reference.token_states("doubled", ["a"], model, encoded, encoded.lengths, doubled)
    for rows in ([0, 2], [3, 1]):
        wanted = np.concatenate([2.0 * encoded.ids[row] for row in rows])
        assert kept.of(encoded.batch(rows))[:, 0].tolist() == wanted.tolist()
