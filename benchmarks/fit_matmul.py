"""(a) How much of the machine's matrix-multiplication rate `fit` turns into training: a Llama of about 5M parameters.

The work is counted from the shapes of the model's matrix products, forward and backward.  The other side runs exactly
these products with torch.mm / torch.bmm in the same dtype, after every step of `fit`: both see the same machine.
Freed memory is kept, as the command line does in its own process (core/allocator.py).

    python benchmarks/fit_matmul.py
"""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import ratio_of, report
from palimpsest.core.allocator import keep_freed_memory
from palimpsest.core.fit import fit
from palimpsest.core.losses import nll
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.batches import Batches, Encoded

ROWS, TOKENS = 16, 128
WARM_UP, STEPS = 3, 25
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


def products() -> list[tuple[int, int, int, int]]:
    """(batch, m, k, n) of each matrix product of one forward pass; attention's are batched over rows and heads."""
    tokens, width, inner = ROWS * TOKENS, CONFIG.hidden_size, CONFIG.intermediate_size
    heads, head = ROWS * CONFIG.num_attention_heads, width // CONFIG.num_attention_heads
    layer = [(1, tokens, width, width)] * 4 + [(1, tokens, width, inner)] * 2 + [(1, tokens, inner, width)]
    layer += [(heads, TOKENS, head, TOKENS), (heads, TOKENS, TOKENS, head)]
    return layer * CONFIG.num_hidden_layers + [(1, tokens, width, CONFIG.vocab_size)]


def matmuls(dtype: torch.dtype):
    """The products of one training step: each forward product, and the two of its backward pass."""
    operands = []
    for batch, m, k, n in products():
        lead = () if batch == 1 else (batch,)
        # weights lie in memory as nn.Linear keeps them: (outputs, inputs)
        operands.append([torch.randn((*lead, *shape), dtype=dtype) for shape in ((m, k), (n, k), (m, n))])

    def run() -> None:
        for x, weight, grad in operands:
            torch.matmul(x, weight.mT)
            torch.matmul(grad, weight)
            torch.matmul(grad.mT, x)

    return run


def step_by_step(model, batches, precision: str, multiply) -> tuple[list[float], list[float]]:
    """Seconds of each step of one run of `fit`, and of the bare products run after it."""
    train, multiply_only = [], []
    began = time.perf_counter()

    def after_step(done: int, model) -> bool:
        nonlocal began
        trained = time.perf_counter()
        train.append(trained - began)
        multiply()
        began = time.perf_counter()
        multiply_only.append(began - trained)
        return False

    fit(model, nll, batches, steps=WARM_UP + STEPS, lr=1e-4, precision=precision, until=after_step, progress="")
    return train[WARM_UP:], multiply_only[WARM_UP:]


def main() -> None:
    keep_freed_memory()
    flops = 3 * sum(2 * batch * m * k * n for batch, m, k, n in products())
    rng = numpy_rng(0, "benchmark")
    ids = tuple(rng.integers(3, CONFIG.vocab_size, TOKENS, dtype=np.int64) for _ in range(256))
    batches = Batches(Encoded(ids, (1,) * len(ids), pad_id=0), ROWS)
    found = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)

        train, multiply_only = step_by_step(model, batches, precision, matmuls(dtype))
        found[precision] = (ratio_of(multiply_only, train), np.median(train), np.median(multiply_only))
    parts = {"parameters": float(sum(p.numel() for p in model.parameters())), "gflop_a_step": flops / 1e9}
    for precision, (share, step, only) in found.items():
        parts |= {
            f"{precision}_share_of_matmul_rate": float(share),
            f"{precision}_fit_gflops": flops / step / 1e9,
            f"{precision}_matmul_gflops": flops / only / 1e9,
            f"{precision}_tokens_a_second": ROWS * TOKENS / step,
        }
    report("fit_matmul", 0.7, float(found["fp32"][0]), **parts)


if __name__ == "__main__":
    main()
