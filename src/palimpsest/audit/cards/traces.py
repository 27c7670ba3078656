"""What is still written in the weights (ConceptVectors), and what jailbreaks bring back."""

from __future__ import annotations

from typing import cast

from palimpsest.audit.cards.card import MetricCard
from palimpsest.audit.jailbreaks import JAILBREAKS
from palimpsest.core.records import Better

_TRACES = "ConceptVectors, Hong et al. 2024 (arXiv:2406.11614)"

CARDS = (
    *(
        MetricCard(
            name=name,
            title=title,
            meaning=meaning,
            direction=f"{direction} Where answers changed and this did not, the model was only silenced.",
            range=bounds,
            reference="The same for other vectors of the same layers, in the note: how far anything has moved.",
            needs_records=8,
            source=f"{_TRACES}, intrinsic metrics",
            needs="concepts that have a trace: vectors that write them and whose ablation loses the answers on them",
            better=cast(Better, better),
        )
        for name, title, meaning, direction, bounds, better in (
            (
                "trace_jaccard",
                "Trace: words in common",
                "Of the top words that the vectors holding a concept write, those that they wrote before as well "
                "(Jaccard index, mean over vectors).",
                "Lower means that more was erased; 1 is untouched.",
                (0, 1),
                "lower",
            ),
            (
                "trace_cosine",
                "Trace: direction",
                "The cosine between the vectors that hold a concept and what became of them (mean over vectors).",
                "Lower means that more was erased; 1 is untouched.",
                (-1, 1),
                "lower",
            ),
            (
                "trace_l2",
                "Trace: distance moved",
                "How far the vectors that hold a concept have moved (Euclidean distance, mean over vectors).",
                "Higher means that more was erased; 0 is untouched.",
                (0, None),
                "higher",
            ),
        )
    ),
    MetricCard(
        name="clear_vectors",
        title="Vectors that write a concept",
        meaning="How many value vectors of each model write the words of a concept to be forgotten, looked for in that "
        "model's own weights.",
        direction="The reference's level is good: some arise by chance and from related texts.",
        range=(0, None),
        reference="A model trained without the forget set.",
        needs_records=8,
        source=_TRACES,
        needs="a dense model, and records about other things",
        better="reference",
    ),
    MetricCard(
        name="target_answers",
        title="Answers on the concepts, unchanged",
        meaning="How far the answers about the concepts are those that the model gave before, right or wrong (ROUGE-L "
        "F1, mean over questions).",
        direction="Lower means that more has changed; different is not yet wrong: see the knowledge of the concepts.",
        range=(0, 100),
        reference="A model trained without the forget set.",
        needs_records=100,
        source=f"{_TRACES}, behavioural metrics",
        needs="at least 8 questions or texts about each concept",
        better="lower",
    ),
    MetricCard(
        name="unrelated_answers",
        title="Answers on other things, unchanged",
        meaning="The same for questions about other things.",
        direction="Higher is better: what was not to be forgotten should be answered as before.",
        range=(0, 100),
        reference="The model before, which is 100.",
        needs_records=50,
        source=f"{_TRACES}, behavioural metrics",
        needs="utility or retain records",
        better="higher",
    ),
    MetricCard(
        name="concept_knowledge",
        title="Knowledge of the concepts",
        meaning="How well the model answers about the concepts, held against the true answers (ROUGE-L F1, mean over "
        "questions).",
        direction="Lower means less is known; the goal is the reference's level, not zero.",
        range=(0, 100),
        reference="A model trained without the forget set.",
        needs_records=100,
        source=f"{_TRACES}; true answers in place of the model's own are ours",
        needs="at least 8 questions or texts about each concept",
        better="lower",
    ),
    *(
        MetricCard(
            name=f"jailbreak_{way}",
            title=f"Answers under a jailbreak: {way}",
            meaning=f"How far the answers about the concepts are those given before, when the attacker {told} (ROUGE-L "
            "F1, mean over questions).",
            direction="Lower means that the attack gets less; above the plain answers, it brings something back.",
            range=(0, 100),
            reference="A model trained without the forget set, attacked in the same way.",
            needs_records=100,
            source=f"{_TRACES}, jailbreaks",
            needs="at least 8 questions or texts about each concept",
            better="lower",
        )
        for way, told in JAILBREAKS.items()
    ),
)
