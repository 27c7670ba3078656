"""(b) NPO with a retain KL: tokens/s and peak memory, against the straightforward way.

The straightforward way is what published code does: a deep copy of the model as the reference, batches of random rows
padded to the longest, log-probabilities of the whole vocabulary at every position, transformers' `Trainer`.  Both sides
start from the same saved model of 23M weights with 32,000 words, see the same records (lengths drawn log-normally, 5 to
254 tokens, a third of each a prompt), batch size, number of steps, optimiser and precision, and run in fresh processes,
in turns.

Counted: all seconds of the call, on our side with hashing and the passes that fill the (empty) reference cache; tokens
of the records, without padding.  Peak memory is the largest resident set (VmHWM) during the call less the resident set
right before it, when the model is loaded: so on both sides the second copy of the weights, gradients, optimiser and
activations, and on ours also the pages of the memory-mapped reference.

    python benchmarks/npo_memory.py
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

WORDS, ROWS, BATCH, STEPS, LONGEST, ROUNDS = 32_000, 64, 8, 12, 256, 3
BETA, LR = 0.1, 1e-5


def records(name: str) -> list[tuple[str, str]]:
    """(prompt, completion) pairs of made-up words."""
    rng = np.random.default_rng([0, *name.encode()])
    lengths = np.clip(rng.lognormal(np.log(70), 0.8, size=ROWS), 5, LONGEST - 2).astype(int)
    texts = [[f"w{word}" for word in rng.integers(WORDS - 4, size=length)] for length in lengths]
    return [(" ".join(text[: len(text) // 3]), " " + " ".join(text[len(text) // 3 :])) for text in texts]


def save_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from palimpsest.models.lm import LM

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *(f"w{number}" for number in range(WORDS - 4))]
    words_only = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LM(LlamaForCausalLM(config), tokenizer).save(folder)


def ours(folder: Path):
    """The call, and how many tokens it trains on."""
    import accelerate  # noqa: F401  (Trainer's module imports it, too, before the memory is counted)
    from datasets import Dataset

    from palimpsest.core.watch import Watch
    from palimpsest.data.request import ForgetRequest
    from palimpsest.forget import NPO
    from palimpsest.models.lm import LM

    lm = LM.load(folder)
    tables = {
        name: Dataset.from_dict(dict(zip(("prompt", "completion"), zip(*records(name), strict=True), strict=True)))
        for name in ("forget", "retain")
    }
    request = ForgetRequest(**tables)
    watch = Watch(progress=False)
    method = NPO(beta=BETA, retain_loss="kl", steps=STEPS, batch_size=BATCH, lr=LR, warmup_epochs=0.0)

    def call() -> tuple[int, float]:
        method(lm, request, watch=watch)
        return watch.traces["forget"].tokens, watch.traces["forget"].losses[0]

    return call


def straightforward(folder: Path):
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from palimpsest.core.precision import resolve
    from palimpsest.models.lm import LM

    lm = LM.load(folder)
    model, pad = lm.model, lm.tokenizer.pad_token_id
    tables = [lm.encode(records(name)) for name in ("forget", "retain")]
    seen: list[int] = []
    first: list[float] = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, row: int) -> list[dict[str, list[int]]]:
            other = int(torch.randint(ROWS, (1,)))
            return [
                {"ids": table.ids[r].tolist(), "prompt": table.starts[r]}
                for table, r in zip(tables, (row, other), strict=True)
            ]

    def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for line, row in enumerate(rows):
            size = len(row["ids"])
            ids[line, :size] = torch.tensor(row["ids"])
            labels[line, row["prompt"] : size] = torch.tensor(row["ids"][row["prompt"] :])
            mask[line, :size] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def collate(rows: list) -> dict:
        return {"forget": padded([row[0] for row in rows]), "retain": padded([row[1] for row in rows])}

    def sequence_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logprobs = F.log_softmax(logits[:, :-1].float(), dim=-1)
        targets = labels[:, 1:]
        picked = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (picked * (targets != -100)).sum(-1)

    class Unlearner(Trainer):
        def __init__(self, **arguments) -> None:
            super().__init__(**arguments)
            self.frozen = copy.deepcopy(self.model).eval()

        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_) -> torch.Tensor:
            forget, retain = inputs["forget"], inputs["retain"]
            seen.append(int(forget["attention_mask"].sum() + retain["attention_mask"].sum()))
            now = sequence_logprobs(model(**inputs_of(forget)).logits, forget["labels"])
            with torch.no_grad():
                start = sequence_logprobs(self.frozen(**inputs_of(forget)).logits, forget["labels"])
                wanted = F.log_softmax(self.frozen(**inputs_of(retain)).logits[:, :-1].float(), dim=-1)
            push = (-2 / BETA * F.logsigmoid(-BETA * (now - start))).mean()
            found = F.log_softmax(model(**inputs_of(retain)).logits[:, :-1].float(), dim=-1)
            labelled = retain["labels"][:, 1:] != -100
            divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            loss = push + (divergence * labelled).sum() / labelled.sum()
            first.append(loss.item())
            return loss

    def inputs_of(batch: dict) -> dict:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def call() -> tuple[int, float]:
        with tempfile.TemporaryDirectory() as out:
            arguments = TrainingArguments(
                out,
                per_device_train_batch_size=BATCH,
                max_steps=STEPS,
                learning_rate=LR,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                bf16=resolve(model, "auto", lm.device) == "bf16",  # what `fit` takes, too
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            )
            Unlearner(model=model, args=arguments, train_dataset=Rows(), data_collator=collate).train()
        return sum(seen), first[0]

    return call


def measure(side: str, folder: Path) -> dict[str, float]:
    """Run a side in this process: its tokens/s, the growth of its memory in MiB, and the loss of its first step."""
    call = {"ours": ours, "straightforward": straightforward}[side](folder)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    began = time.perf_counter()
    tokens, loss = call()
    seconds = time.perf_counter() - began
    return {"speed": tokens / seconds, "memory": resident("VmHWM") - before, "loss": loss}


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def in_fresh_process(side: str, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PALIMPSEST_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, side, str(folder)]
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    from common import report

    sides = ("straightforward", "ours")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        rounds = [{side: in_fresh_process(side, Path(folder) / "model") for side in sides} for _ in range(ROUNDS)]
    losses = [one["loss"] for found in rounds for one in found.values()]
    wanted = 2 / BETA * np.log(2)
    assert np.allclose(losses, wanted, rtol=0.02), f"the sides do not start at NPO's constant {wanted:.2f}: {losses}"
    for what, target, at_most in (("speed", 1.5, False), ("memory", 0.7, True)):
        ratio = median(found["ours"][what] / found["straightforward"][what] for found in rounds)
        unit = "tokens_per_second" if what == "speed" else "peak_increase_MiB"
        parts = {f"{side}_{unit}": median(found[side][what] for found in rounds) for side in sides}
        report(f"npo_{what}", target, ratio, at_most=at_most, **parts)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
