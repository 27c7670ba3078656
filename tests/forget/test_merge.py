"""Task-vector negation: exactly start - scale * learned, also of one LoRA factor, and by strides where one may stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import TaskVector
from palimpsest.forget.merge import stretch
from palimpsest.forget.unlearn import Budget, trainable_copy
from palimpsest.models.lm import LM

QUICK = {"steps": 3, "batch_size": 8, "lr": 1e-3}


class Spy(Watch):
    """Keeps a merged copy of the reinforced model, as it is before the walk back."""

    def fit(self, name: str, model: nn.Module, *arguments: object, **named: object):  # type: ignore[no-untyped-def, override]
        import copy

        trace = super().fit(name, model, *arguments, **named)  # type: ignore[arg-type]
        copied = copy.deepcopy(model)
        object.__setattr__(self, "reinforced", copied.merge_and_unload() if hasattr(copied, "peft_config") else copied)
        return trace


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_result_is_start_minus_scale_times_what_was_learned(
    lm: LM, records: ForgetRequest, lora_rank: int, scale: float
) -> None:
    spy = Spy(progress=False)
    after = TaskVector(scale=scale, lora_rank=lora_rank, **QUICK)(lm, records, watch=spy)  # type: ignore[arg-type]
    start, learned = lm.model.state_dict(), spy.reinforced.state_dict()  # type: ignore[attr-defined]
    moved = 0
    for name, weight in after.model.state_dict().items():
        wanted = start[name].double() - scale * (learned[name].double() - start[name].double())
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-5)
        moved += not torch.equal(weight, start[name])
    assert moved


def test_negating_one_factor_is_not_negating_both(llama: LM) -> None:
    work = trainable_copy(Budget(lora_rank=2), llama)
    with torch.no_grad():
        for name, p in work.named_parameters():
            if "lora_B" in name:
                p.normal_()
    ids = torch.tensor([[5, 6, 7]])
    there = work(input_ids=ids).logits
    stretch(work, llama.model, -1.0)
    back = work(input_ids=ids).logits
    assert (there - back).abs().max() > 1e-2
    with torch.no_grad():
        for name, p in work.named_parameters():
            if "lora_A" in name:
                p.neg_()
    torch.testing.assert_close(work(input_ids=ids).logits, there)


def test_strides_end_where_the_watch_is_satisfied(llama: LM, records: ForgetRequest) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def until(step: int, model: nn.Module) -> bool:
        seen.append((step, next(model.parameters()).detach().clone()))
        return len(seen) == 3

    method = TaskVector(scale=5.0, scales_tried=10, **QUICK)  # type: ignore[arg-type]
    after = method(llama, records, watch=Watch(progress=False, until=until))
    assert [step for step, _ in seen] == [0, 0, 0]
    direct = TaskVector(scale=1.5, **QUICK)(llama, records, watch=Watch(progress=False))  # type: ignore[arg-type]
    for one, other in zip(after.model.parameters(), direct.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    start = next(llama.model.parameters())
    strides = [(weight - start).norm().item() for _, weight in seen]
    assert strides == pytest.approx([strides[0], 2 * strides[0], 3 * strides[0]], rel=1e-3)


def test_without_a_stop_the_whole_way_is_walked(llama: LM, records: ForgetRequest) -> None:
    never = Watch(progress=False, until=lambda step, model: False)
    to_the_end = TaskVector(scales_tried=4, **QUICK)(llama, records, watch=never)  # type: ignore[arg-type]
    at_once = TaskVector(**QUICK)(llama, records, watch=Watch(progress=False))  # type: ignore[arg-type]
    for one, other in zip(to_the_end.model.parameters(), at_once.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_forget_set_becomes_less_likely(taught: LM, records: ForgetRequest, watch: Watch, lora_rank: int) -> None:
    method = TaskVector(steps=10, batch_size=8, lr=1e-2 if lora_rank else 3e-3, scale=5.0, lora_rank=lora_rank)
    after = method(taught, records, watch=watch)
    assert after.nll(records.forget).mean() > taught.nll(records.forget).mean() + 0.3
    assert watch.traces["reinforce"].losses[-1] < watch.traces["reinforce"].losses[0]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_zero_task_vector_is_an_error(llama: LM, records: ForgetRequest, watch: Watch, lora_rank: int) -> None:
    with pytest.raises(InputError, match="task vector is zero"):
        TaskVector(steps=1, lr=1e-60, weight_decay=0.0, lora_rank=lora_rank)(llama, records, watch=watch)


def test_it_is_taken_up_again(llama: LM, records: ForgetRequest, tmp_path: Path) -> None:
    method = TaskVector(**QUICK)  # type: ignore[arg-type]
    watch = Watch(progress=False, checkpoint=tmp_path)
    first = method(llama, records, watch=watch)
    assert method(llama, records, watch=watch).sha256 == first.sha256


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scales_tried": 0}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TaskVector(**wrong)  # type: ignore[arg-type]
