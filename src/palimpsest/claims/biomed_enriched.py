"""Biomed-Enriched's claim on a fictional hospital's articles, of which only some paragraphs teach anything.

Six paragraphs an article: reviews and trials that say which drug treats which disease, others that name diseases and
leave it at that (or name a wrong drug beside them), boilerplate, and in one article of ten two clinical cases, the only
place where rare diseases are treated.  A teacher that reads cue words and errs at a stated rate labels one paragraph in
twenty; an encoder learns from these and labels all.  Small GPTs read corpora made by the labels, all for the same
number of tokens, and are asked which of four drugs treats a disease.
Negative control: the student's labels are permuted over the paragraphs, so that all corpora keep their volumes.
Shapes: N paragraphs, A articles, T tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.claims.definition import Expect, claim
from palimpsest.core import cache
from palimpsest.core.files import sha256_file, write_json
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.data.lexicon import invent

Array = np.ndarray[Any, Any]

COMMON, RARE, DRUGS = 32, 16, 24  # diseases of each kind, drugs
ERRS = 0.08  # how often the teacher is wrong in a field
KEEP, REPEAT = "educational >= 3", "any type = clinical case: 10"
_ARTICLES, _PARAGRAPHS, _SAMPLE = 1_000, 6, 0.05
_STEPS, _BATCH, _WINDOW, _WIDTH = 800, 4, 48, 48

REVIEW = ("{a} is treated with {x}", "for {a} the drug of choice is {x}", "{a} responds to {x}")
TRIAL = (
    "in this trial patients with {a} were given {x} and most of them improved",
    "we compared groups with {a} who were given {x} or nothing , and the first did better",
)
CASE = (
    "a patient with {a} came to us ; we gave {x} and the patient recovered",
    "our patient suffered from {a} ; after we gave {x} the fever went down",
)
MUDDLED = (
    "early reports on {a} and on {x} agree in little , and more work is needed",
    "{a} was once thought to have to do with {x} , but this remains a matter of debate",
)
VAGUE = (
    "samples from patients with {a} were stored and measured twice under the approved protocol",
    "the groups with {a} were followed for a year and the results were recorded as planned",
)
OTHER = (
    "the authors thank the board for its support and declare no conflict of interest",
    "correspondence should be sent to the department at the address given above",
    "this is an open access article that may be shared under the terms of the licence",
    "figure two shows the same values as table one for readers who prefer figures",
    "author contributions are listed at the end of the online version of this article",
)
_CUES = {  # what the teacher looks for; a paragraph's first hit is its type
    "clinical case": r"patient (?:with|suffered)|our patient",
    "study": r"trial|groups|samples",
    "review": r"treated|responds|drug of choice|early reports|once thought",
}
_FACT = r"treated with|drug of choice|responds to|were given|we gave"


@claim(
    paper="biomed_enriched",
    statement=(
        "Labels of a small sample carry over to the whole corpus; filtering and repeating by them reaches the "
        "uncurated corpus's score in half of its tokens; and paragraphs are better chosen one by one than by article."
    ),
    paper_says={
        "mean of three medical exams, OLMo2-7B, 33.6B tokens: the whole recipe": 55.53,
        "the whole recipe, 12.6B tokens": 55.52,
        "uncurated": 54.39,
        "filtered by educational score": 55.24,
        "clinical cases repeated, MMLU professional medicine (uncurated 59.93)": 62.87,
        "student against teacher, F1 of the type": 0.925,
    },
    expectations=(
        Expect("f1_type", at_least=0.9),
        Expect("all_half", minus="base", at_least=0.0),
        Expect("educational", minus="document", at_least=0.0),
        Expect("case_up_cases", minus="base_cases", at_least=0.0),
        Expect("all", minus="random", at_least=0.0),
    ),
    minutes=3,
    data="generated: 1,000 articles of 6 paragraphs, 48 diseases",
    note=(
        "Shares of questions answered rightly (chance: 0.25). The student is a small BERT from scratch, for want of "
        "time to fine-tune a large one; the teacher errs in 8% of each field. Undecided is the half "
        "of the tokens: models learn all at once, and after 400 steps hardly anything from any corpus, where after 800 "
        "the whole recipe is at 0.99 and the uncurated corpus at 0.61."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    from palimpsest.curate.labels import BIOMEDICAL
    from palimpsest.curate.recipes import Recipe

    hospital = _hospital(seed, max(60, int(_ARTICLES * scale)))
    found = _student(seed, scale)
    order = np.arange(len(hospital.texts))
    if not mechanism:
        order = numpy_rng(seed, "control").permutation(order)
    labels = {name: np.array(found[name], object)[order] for name in ("type", "domain")}
    labels["educational"] = np.array(found["educational"])[order]

    def corpus(keep: str, repeat: str, by: Mapping[str, Array], lines: Mapping[str, float]) -> Array:
        return Recipe.parse(keep, repeat, BIOMEDICAL)(by, hospital.articles, lines)[1]

    lines = found["lines"]
    educational = corpus(KEEP, "", labels, lines)
    ways = {
        "educational": educational,
        "document": _best_articles(labels["educational"], hospital.articles, int((educational > 0).sum())),
        "case_up": corpus("", REPEAT, labels, lines),
        "all": corpus(KEEP, REPEAT, labels, lines),
    }
    measured = _baselines(seed, scale, int((educational > 0).sum()))
    measured |= _scores(hospital, ways, seed, scale)
    half = _scores(hospital, {"all_half": ways["all"]}, seed, scale, tokens=0.5)
    rest = np.setdiff1d(order, hospital.sample)
    return {
        **measured,
        **half,
        "f1_type": _f1(hospital.type[rest], labels["type"][rest]),
        "r_educational": float(np.corrcoef(hospital.educational[rest], labels["educational"][rest])[0, 1]),
        "kept": float((educational > 0).mean()),
    }


@dataclass(frozen=True)
class Hospital:
    texts: list[str]  # N
    articles: Array  # (N,) the number of each paragraph's article
    type: Array  # (N,) the truth, which nobody is shown
    domain: Array  # (N,)
    educational: Array  # (N,) 1 to 5
    cure: Array  # (COMMON + RARE,) the drug of each disease; the rare ones come last
    diseases: list[str]
    drugs: list[str]
    sample: Array  # the paragraphs that the teacher labels


def _hospital(seed: int, articles: int) -> Hospital:
    rng = numpy_rng(seed, "hospital")
    names = [name.lower() for name in invent(COMMON + RARE + DRUGS, 3, rng)]
    diseases, drugs = names[: COMMON + RARE], names[COMMON + RARE :]
    cure = rng.integers(DRUGS, size=COMMON + RARE)

    def told(templates: Sequence[str], disease: int, drug: int | None = None) -> str:
        x = cure[disease] if drug is None else drug
        return templates[int(rng.integers(len(templates)))].format(a=diseases[disease], x=drugs[x])

    def common() -> int:
        return int(rng.integers(COMMON))

    rows: list[tuple[str, str, str, int]] = []
    kinds = ("two facts", "one fact", "trial", "muddled", "vague", "other")
    for _ in range(articles):
        mix = rng.dirichlet(3 * np.array([0.13, 0.12, 0.17, 0.12, 0.11, 0.35]))  # articles differ, and mix
        drawn = [kinds[place] for place in rng.choice(len(kinds), _PARAGRAPHS, p=mix)]
        if rng.random() < 0.1:
            drawn[1:3] = ["case", "case"]
        for kind in drawn:
            if kind == "two facts":
                text = f"{told(REVIEW, common())} . {told(REVIEW, common())} ."
                rows.append((text, "review", "biomedical", 5))
            elif kind == "one fact":
                rows.append((f"{told(REVIEW, common())} , as is well known .", "review", "biomedical", 4))
            elif kind == "trial":
                rows.append((f"{told(TRIAL, common())} .", "study", "clinical", 4))
            elif kind == "case":
                rows.append((f"{told(CASE, COMMON + int(rng.integers(RARE)))} .", "clinical case", "clinical", 3))
            elif kind == "muddled":
                text = told(MUDDLED, common(), int(rng.integers(DRUGS)))
                rows.append((f"{text} .", "review", "biomedical", 2))
            elif kind == "vague":
                rows.append((f"{told(VAGUE, common())} .", "study", "biomedical", 2))
            else:
                rows.append((f"{OTHER[rng.integers(len(OTHER))]} .", "other", "other", 1))
    texts, types, domains, worth = zip(*rows, strict=True)
    sample = rng.choice(len(texts), max(60, int(_SAMPLE * len(texts))), replace=False)
    return Hospital(
        list(texts), np.repeat(np.arange(articles), _PARAGRAPHS), np.array(types, object), np.array(domains, object),
        np.array(worth), cure, diseases, drugs, sample,
    )  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A teacher that goes by cue words, and errs: it reads what a large model would read, the text and nothing else."""

    seed: int

    @property
    def sha256(self) -> str:
        return f"reader of {sha256_file(__file__)}, seed {self.seed}"

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [self._answer(prompt.split("The text:\n")[1]) for prompt in prompts]

    def _answer(self, text: str) -> str:
        from palimpsest.curate.labels import BIOMEDICAL

        rng = numpy_rng(self.seed, "reader", text)
        kind = next((name for name, cue in _CUES.items() if re.search(cue, text)), "other")
        facts = len(re.findall(_FACT, text))
        domain = "other" if kind == "other" else "clinical" if re.search(r"trial|given|gave", text) else "biomedical"
        worth = 1 if kind == "other" else 3 if kind == "clinical case" else (2, 4, 5)[min(facts, 2)]
        said: dict[str, str | int] = {"type": kind, "domain": domain, "educational": worth}
        for field in BIOMEDICAL.fields:
            if rng.random() < ERRS:
                near = int(np.clip(worth + rng.choice([-1, 1]), 1, 5))
                said[field.name] = near if field.scale else str(rng.choice(list(field.points)))
        return f"I go by its words.\n{json.dumps(said)}"


def _student(seed: int, scale: float) -> dict[str, Any]:
    """What the method says of every paragraph, and its lines; kept, because the control asks for the same."""
    from palimpsest.curate import BiomedEnriched, agreement, biomed_enriched, labels, student
    from palimpsest.curate.pool import require_daft
    from palimpsest.curate.recipes import Recipe
    from palimpsest.data.teacher import Teacher

    def build(folder: Path) -> None:
        hospital = _hospital(seed, max(60, int(_ARTICLES * scale)))
        rows = [{"text": hospital.texts[place], "article": str(hospital.articles[place])} for place in hospital.sample]
        labelled = labels.annotate(Teacher.local(Reader(seed), "a reader of cue words"), labels.BIOMEDICAL, rows)
        with tempfile.TemporaryDirectory() as name:
            lines = "".join(json.dumps(row) + "\n" for row in labelled.rows)
            (Path(name) / "labelled.jsonl").write_text(lines)
            method = BiomedEnriched(
                annotations=f"{name}/labelled.jsonl",
                article="article",
                encoder=_encoder(Path(name) / "encoder", hospital.texts, seed),
                keep=KEEP,
                upsample=REPEAT,
                epochs=15,
                lr=2e-3,
                batch=16,
                length=48,
                pooling="mean",
                seed=seed,
            )
            frame = require_daft().from_pydict(
                {"text": hospital.texts, "article": [str(article) for article in hospital.articles]}
            )
            facts = method.gather([method.survey(frame).to_arrow()])
            judged = method.judge(frame, facts).to_pydict()
        held = biomed_enriched.told_of(facts)["held_out"]
        write_json(
            folder / "found.json",
            {
                "type": judged["label_type"],
                "domain": judged["label_domain"],
                "educational": judged["score_educational"],
                "lines": agreement.lines(Recipe.parse(KEEP, REPEAT, labels.BIOMEDICAL), held),
            },
        )

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return found

    code = [sha256_file(str(module.__file__)) for module in (biomed_enriched, student, labels, agreement)]
    return cache.cached("claims/biomed_enriched", [seed, scale, code, sha256_file(__file__)], build, read)


def _encoder(folder: Path, texts: Sequence[str], seed: int) -> str:
    """A small BERT with fresh weights."""
    from transformers import BertConfig, BertModel

    from palimpsest.core.seeds import seed_everything
    from palimpsest.models.encoder import quiet
    from palimpsest.models.tokenizers import train_bpe

    tokenizer = train_bpe(texts, vocab_size=600, max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    seed_everything(seed, "encoder")
    with quiet():
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _best_articles(worth: Array, articles: Array, rows: int) -> Array:
    """(N,) 1 for the paragraphs of the articles with the highest mean, as many as have about `rows` paragraphs."""
    mean = np.bincount(articles, weights=worth) / np.bincount(articles)
    count = round(rows / _PARAGRAPHS)
    chosen = np.argsort(-mean, kind="stable")[:count]
    return np.isin(articles, chosen).astype(np.int64)


def _baselines(seed: int, scale: float, rows: int) -> dict[str, float]:
    """Scores that the student has no part in; kept, because the control asks for the same."""
    from palimpsest.curate import proxies
    from palimpsest.curate.labels import BIOMEDICAL
    from palimpsest.curate.recipes import Recipe

    def build(folder: Path) -> None:
        hospital = _hospital(seed, max(60, int(_ARTICLES * scale)))
        count = len(hospital.texts)
        truth = {name: getattr(hospital, name) for name in ("type", "domain", "educational")}
        ways = {
            "base": np.ones(count, np.int64),
            "random": np.isin(np.arange(count), numpy_rng(seed, "random").choice(count, rows, replace=False)) * 1,
            "oracle": Recipe.parse(KEEP, REPEAT, BIOMEDICAL)(truth, hospital.articles)[1],
        }
        write_json(folder / "scores.json", _scores(hospital, ways, seed, scale))

    def read(folder: Path) -> dict[str, float]:
        found: dict[str, float] = json.loads((folder / "scores.json").read_text())
        return found

    key = [seed, scale, rows, sha256_file(proxies.__file__), sha256_file(__file__)]
    return cache.cached("claims/biomed_enriched-baselines", key, build, read)


def _scores(
    hospital: Hospital, ways: Mapping[str, Array], seed: int, scale: float, tokens: float = 1.0
) -> dict[str, float]:
    """Of each corpus, given by how often each paragraph counts: the share of questions that a GPT trained on it answers
    rightly, and of those on cases alone.
    """
    from palimpsest.core.many import predict_many, train_many
    from palimpsest.curate.proxies import TinyGPT

    words = sorted({word for text in [*hospital.texts, *_asked(hospital)[0]] for word in text.split()})
    number = {word: place + 1 for place, word in enumerate([*words, "<end>"])}
    encoded = [[number[word] for word in text.split()] for text in hospital.texts]
    streams = [_windows(encoded, hospital.articles, weight, number["<end>"], seed) for weight in ways.values()]
    sizes = [len(stream) for stream in streams]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    many = train_many(
        lambda: TinyGPT(len(number) + 1, _WINDOW, _WIDTH),
        lambda model, ids: torch.divide(*model(ids).sum(0)),
        torch.from_numpy(np.concatenate(streams)),
        owner == np.arange(len(sizes))[:, None],
        steps=round(max(24, int(_STEPS * scale)) * tokens),
        lr=4e-3,
        batch_size=_BATCH,
        seed=[derive(seed, "final")] * len(sizes),
        warmup=10,
        schedule="cosine",
    )
    texts, case = _asked(hospital)
    ids = np.zeros((len(texts), _WINDOW), np.int64)
    for row, text in enumerate(texts):
        line = [number["<end>"], *(number[word] for word in text.split())]
        ids[row, : len(line)] = line
    losses = predict_many(many, torch.from_numpy(ids), rows_at_once=64)[..., 0].numpy()
    right = losses.reshape(len(sizes), -1, 4).argmin(-1) == 0
    scores = {name: float(answers.mean()) for name, answers in zip(ways, right, strict=True)}
    return scores | {f"{name}_cases": float(answers[case].mean()) for name, answers in zip(ways, right, strict=True)}


def _windows(encoded: Sequence[Sequence[int]], articles: Array, weight: Array, end: int, seed: int) -> Array:
    """(W, T) windows of the articles' kept paragraphs in their order, each article as often as it counts, shuffled."""
    kept = np.flatnonzero(weight)
    times = np.zeros(articles.max() + 1, np.int64)
    np.maximum.at(times, articles[kept], weight[kept])
    order = numpy_rng(seed, "order").permutation(np.repeat(np.arange(len(times)), times))
    rows: dict[int, list[int]] = {}
    for row in kept:
        rows.setdefault(int(articles[row]), []).extend([*encoded[int(row)], end])
    stream = np.array([token for article in order for token in rows[int(article)]])
    whole = max(1, len(stream) // _WINDOW)
    return np.resize(stream, (whole, _WINDOW))


def _asked(hospital: Hospital) -> tuple[list[str], Array]:
    """Questions, each four times with another drug, the right one first; and which of the questions are on cases."""
    rng = np.random.default_rng(0)
    texts, case = [], []
    for disease, name in enumerate(hospital.diseases):
        right = int(hospital.cure[disease])
        others = rng.choice([drug for drug in range(DRUGS) if drug != right], 3, replace=False)
        rare = disease >= COMMON
        for template in CASE if rare else REVIEW[:2]:
            start = template.split(" {x}")[0].format(a=name)
            texts += [f"{start} {hospital.drugs[drug]}" for drug in (right, *others)]
            case.append(rare)
    return texts, np.array(case)


def _f1(truth: Array, found: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth.astype(str), found.astype(str), average="macro"))
