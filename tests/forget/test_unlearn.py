"""The one loop of the gradient unlearners: what it trains, what it refuses, and that it can be taken up again."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import NPO, GradDiff, GradientAscent, KLMin
from palimpsest.forget.unlearn import Budget, Regularised, encode, encode_retain, plain, trainable_copy
from palimpsest.models.anatomy import layers
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM

QUICK = {"steps": 3, "batch_size": 8, "lr": 1e-3}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"epochs": -1.0}, "epochs must be above 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"micro_batches": 0}, "micro_batches must be above 0"),
        ({"lora_rank": -1}, "lora_rank must not be below 0"),
        ({"steps": -1}, "steps must not be below 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"weight_decay": float("nan")}, "weight_decay must not be below 0"),
        ({"steps": 10, "epochs": 3.0}, "contradict each other"),
    ],
)
def test_budgets_that_cannot_be_are_refused_when_made(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Budget(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": 0.0}, "contradicts retain_loss 'nll'"),
        ({"alpha": -1.0}, "contradicts retain_loss 'nll'"),
        ({"alpha": 2.0, "retain_loss": "none"}, "would be ignored"),
        ({"gamma": 0.0}, "gamma must be above 0"),
    ],
)
def test_retain_options_that_contradict_each_other_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Regularised(**wrong)  # type: ignore[arg-type]


def test_steps_and_warmup_follow_the_epochs(llama: LM, records: ForgetRequest) -> None:
    encoded = llama.encode(records.forget)
    budget = Budget(epochs=2.5, batch_size=8)
    batches = budget.batches(encoded)
    assert budget.total_steps(batches) == round(2.5 * -(-len(encoded) // 8))
    assert budget.training(5)["warmup"] == 5
    assert Budget(steps=3).training(5)["warmup"] == 3  # the whole run, not more
    assert Budget(batch_size=10_000).batches(encoded).batch_size == len(encoded)


def test_a_retain_batch_is_as_large_as_a_forget_batch(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    few = replace(records, forget=records.forget.select(range(5)))
    sizes: list[tuple[int, int]] = []
    kl = losses.nll

    def spy(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        sizes.append((len(batch), batch.total_rows))
        return kl(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "nll", spy)
        GradDiff(steps=2, batch_size=8)(llama, few, watch=watch)
    assert set(sizes) == {(5, 5)}


def test_the_loss_is_the_weighted_sum_of_its_parts(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    GradDiff(gamma=0.5, alpha=2.0, **QUICK)(llama, records, watch=watch)  # type: ignore[arg-type]
    trace = watch.traces["forget"]
    parts = 0.5 * np.array(trace.logs["forget"]) + 2.0 * np.array(trace.logs["retain"])
    np.testing.assert_allclose(trace.losses, parts, rtol=1e-5)


def test_kl_to_the_start_is_zero_in_the_first_step_and_grows(lm: LM, records: ForgetRequest, watch: Watch) -> None:
    KLMin(steps=4, batch_size=8, lr=1e-2, warmup_epochs=0)(lm, records, watch=watch)
    found = watch.traces["forget"].logs["retain"]
    assert abs(found[0]) < 1e-6
    assert min(found[1:]) > 1e-4


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_micro_batches_change_nothing_but_memory(llama: LM, records: ForgetRequest, lora_rank: int) -> None:
    def losses_with(pieces: int) -> list[float]:
        watch = Watch(progress=False)
        NPO(micro_batches=pieces, lora_rank=lora_rank, retain_loss="kl", **QUICK)(llama, records, watch=watch)  # type: ignore[arg-type]
        return watch.traces["forget"].losses

    np.testing.assert_allclose(losses_with(3), losses_with(1), rtol=1e-4)


def test_lora_trains_factors_over_the_very_weights_of_the_start(lm: LM) -> None:
    work = trainable_copy(Budget(lora_rank=2), lm)
    theirs = {p.data_ptr() for p in lm.model.parameters()}
    trained = [name for name, p in work.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.data_ptr() in theirs for name, p in work.named_parameters() if "lora_" not in name)
    touched = {name.split("layers.")[-1].split("h.")[-1].split(".")[0] for name in trained}
    assert touched == {str(number) for number in range(len(layers(lm.model)))}


def test_lora_ends_in_weights_of_its_own(lm: LM, records: ForgetRequest, watch: Watch) -> None:
    before = lm.weights_sha256
    after = GradientAscent(lora_rank=2, **QUICK)(lm, records, watch=watch)  # type: ignore[arg-type]
    assert lm.weights_sha256 == before != after.weights_sha256
    assert not hasattr(after.model, "peft_config")
    assert not {p.data_ptr() for p in lm.model.parameters()} & {p.data_ptr() for p in after.model.parameters()}
    assert after.nll(records.forget).mean() > lm.nll(records.forget).mean()


def test_lora_factors_follow_the_seed(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    def weights(seed: int) -> str:
        torch.manual_seed(torch.seed() % 2**31)  # whatever was drawn before
        return GradientAscent(lora_rank=2, seed=seed, **QUICK)(llama, records, watch=watch).weights_sha256  # type: ignore[arg-type]

    assert weights(0) == weights(0) != weights(1)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_half_precision_comes_back_as_half_precision(
    llama: LM, records: ForgetRequest, watch: Watch, lora_rank: int
) -> None:
    half = replace(llama, model=llama.copy().model.bfloat16())
    after = NPO(steps=3, batch_size=8, lr=1e-2, retain_loss="kl", lora_rank=lora_rank)(half, records, watch=watch)
    assert {p.dtype for p in after.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert after.nll(records.forget).mean() > half.nll(records.forget).mean()


def test_an_adapter_is_forgotten_through(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    adapted = replace(llama, model=trainable_copy(Budget(lora_rank=2), llama))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in adapted.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    after = KLMin(**QUICK)(adapted, records, watch=watch)  # type: ignore[arg-type]
    assert not hasattr(after.model, "peft_config")
    assert abs(watch.traces["forget"].logs["retain"][0]) < 1e-5  # it started from the adapted model, not the bare one
    assert hasattr(adapted.model, "peft_config")


def test_a_method_that_changes_nothing_says_so(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    with pytest.raises(InputError, match="changed no weight"):
        GradientAscent(steps=1, lr=1e-60, weight_decay=0.0)(llama, records, watch=watch)


def test_a_guarded_model_is_refused(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="PromptGuard"):
        plain(llama.with_guard(PromptGuard("{prompt}")))
    with pytest.raises(InputError, match="PromptGuard"):
        NPO()(llama.with_guard(PromptGuard("{prompt}")), records)


def test_a_retain_term_needs_retain_records(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="needs retain records"):
        NPO()(llama, ForgetRequest(records.forget))
    NPO(retain_loss="none", **QUICK)(llama, ForgetRequest(records.forget), watch=Watch(progress=False))  # type: ignore[arg-type]


def test_records_without_a_token_to_forget_are_counted(llama: LM) -> None:
    bare = replace(llama, tokenizer=_without_bos(llama))
    table = Dataset.from_dict({"text": ["one thing", "e", "another thing"]})
    if (bare.encode(table).lengths > 1).all():
        table = Dataset.from_dict({"text": ["one thing", "", "another thing"]})
    with pytest.raises(InputError, match=r"1 of 3 forget records .* first record 2"):
        encode(Budget(), bare, table)
    kept = encode_retain(Budget(), bare, ForgetRequest(Dataset.from_dict({"text": ["x y z"]}), table))
    assert len(kept) == 2


def _without_bos(lm: LM):  # type: ignore[no-untyped-def]
    import copy

    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.bos_token = None
    tokenizer.eos_token = None
    return tokenizer


def test_nothing_but_masked_labels_is_refused(llama: LM) -> None:
    bare = replace(llama, tokenizer=_without_bos(llama))
    with pytest.raises(InputError, match="no token to score"):
        encode(Budget(), bare, Dataset.from_dict({"text": ["", ""]}))


def test_the_watch_stops_it(llama: LM, records: ForgetRequest) -> None:
    watch = Watch(progress=False, until=lambda step, model: step == 2)
    GradientAscent(steps=50)(llama, records, watch=watch)
    assert (watch.traces["forget"].steps, watch.traces["forget"].stopped) == (2, "until")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_interrupted_method_goes_on_to_the_same_weights(
    llama: LM, records: ForgetRequest, tmp_path: Path, lora_rank: int
) -> None:
    method = NPO(steps=6, batch_size=8, lr=1e-3, retain_loss="kl", lora_rank=lora_rank)
    whole = method(llama, records, watch=Watch(progress=False))

    def press(step: int, model: torch.nn.Module) -> bool:
        if step == 3:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return False

    with pytest.raises(KeyboardInterrupt, match="after step 4 of 6"):
        method(llama, records, watch=Watch(progress=False, checkpoint=tmp_path, until=press))
    watch = Watch(progress=False, checkpoint=tmp_path)
    with pytest.raises(InputError, match="another run"):
        replace(method, beta=0.5)(llama, records, watch=watch)
    assert method(llama, records, watch=watch).weights_sha256 == whole.weights_sha256
