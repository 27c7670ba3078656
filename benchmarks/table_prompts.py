"""(j) Tables as prompts: tokens a row against JSON and key-value text, and many queries of one prompt against one each.

All three ways go through one byte-level tokenizer, trained on all of them, in which every integer up to 999 is a token,
as in the paper's; feature names are scikit-learn's.  The model of the second part is small and not trained: what a
query costs does not depend on what it is answered.

    OMP_NUM_THREADS=1 python benchmarks/table_prompts.py
"""

from __future__ import annotations

import json

import numpy as np
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from common import in_turns, ratio_of, report
from palimpsest.core.watch import Watch
from palimpsest.data.tables import TablePrior, Tables
from palimpsest.learn.incontext import MachineLearningLM
from palimpsest.learn.incontext.table_prompts import integers

SHOTS, QUERIES = 32, 50


def main() -> None:
    tables = {"iris": load_iris(), "wine": load_wine(), "breast_cancer": load_breast_cancer()}
    written = {name: ways(table.data, table.target, table.feature_names) for name, table in tables.items()}
    numbers = [str(number) for number in range(1000)] * 3
    tokenizer = trained([*numbers, *(row for found in written.values() for rows in found.values() for row in rows)])
    parts, ratios = {}, []
    for name, found in written.items():
        tokens = {way: np.mean([len(tokenizer.encode(row).ids) for row in rows]) for way, rows in found.items()}
        parts |= {f"{name} {way}": float(mean) for way, mean in tokens.items()}
        ratios.append(min(tokens["json"], tokens["key_value"]) / tokens["ours"])
    report("table_prompt_tokens", 3.0, float(np.median(ratios)), **parts)
    report("table_queries_together", 1.0, together())


def ways(x: np.ndarray, y: np.ndarray, names: list[str]) -> dict[str, list[str]]:
    cells = integers(x, x)
    return {
        "ours": [f"{','.join(map(str, row))}|{label}\n" for row, label in zip(cells.tolist(), y, strict=True)],
        "json": [
            json.dumps({**dict(zip(names, row, strict=True)), "label": int(label)}) + "\n"
            for row, label in zip(x.tolist(), y, strict=True)
        ],
        "key_value": [
            f"{', '.join(f'{name} is {value}' for name, value in zip(names, row, strict=True))}. Label: {label}.\n"
            for row, label in zip(x.tolist(), y, strict=True)
        ],
    }


def trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"[0-9]{1,3}| ?[A-Za-z]+|[^0-9A-Za-z]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    assert len(tokenizer.encode("7,45,999").ids) == 5
    return tokenizer


def together() -> float:
    """How many times faster a query is among `QUERIES` of one prompt than in a prompt of its own."""
    x, y = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order, :8], y[order]
    stream = Tables(TablePrior(columns=(2, 4), classes=(2, 3)), shots=(8, 8), queries=4, batch_size=2)
    sides = []
    for queries in (1, QUERIES):
        learner = MachineLearningLM(layout="prompt", steps=1, warm_share=0.0, votes=1, together=queries)
        predictor = learner.meta_fit(stream, watch=Watch(progress=False)).predictor(x[:SHOTS], y[:SHOTS], 3)
        sides.append(lambda predictor=predictor: predictor.probabilities(x[SHOTS : SHOTS + QUERIES]))
    in_turns(*sides, rounds=1)
    alone, joined = in_turns(*sides, rounds=3)
    return ratio_of(alone, joined)


if __name__ == "__main__":
    main()
