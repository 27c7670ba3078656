"""What MUSE's six ways measure, and what is read beside them."""

from __future__ import annotations

from palimpsest.audit.cards.card import MetricCard

_MUSE = "MUSE, Shi et al. 2024 (arXiv:2407.06460)"

CARDS = (
    MetricCard(
        name="verbatim",
        title="Verbatim memorisation",
        meaning="Given the beginning of a forget record, how much of the rest the model writes word for word "
        "(ROUGE-L F1 between its greedy continuation and the true one).",
        direction="Lower means less is recited; the goal is the reference's level, not zero.",
        range=(0, 100),
        reference="A model trained without the forget set. It is not at zero either: common phrases can be guessed.",
        needs_records=100,
        source=f"{_MUSE}, criterion C1",
        needs="forget records that are texts long enough to be cut into a prompt and a continuation",
        better="reference",
    ),
    MetricCard(
        name="knowledge",
        title="Knowledge of the forget set",
        meaning="How well the model answers questions about the forget set (ROUGE-L F1 of the answer, mean over "
        "questions).",
        direction="Lower means less is known; the goal is the reference's level, not zero.",
        range=(0, 100),
        reference="A model trained without the forget set: it can still guess.",
        needs_records=100,
        source=f"{_MUSE}, criterion C2",
        needs="forget records with a prompt and a completion",
        better="reference",
    ),
    MetricCard(
        name="privacy_leakage",
        title="Privacy leakage",
        meaning="Whether an outsider who sees only token probabilities can tell that the forget set was trained on, "
        "or that it was "
        "scrubbed. The Min-K% attack's AUC, in percent of the same AUC on the reference.",
        direction="Zero is good. Far below zero: the records still look trained on. Far above zero: they look "
        "suspiciously unknown.",
        range=(-100, None),
        reference="Zero by construction: the attack on a model trained without the forget set.",
        needs_records=100,
        source=f"{_MUSE}, criterion C3; the attack is Min-K% Prob, Shi et al. 2024 (arXiv:2310.16789)",
        unit="%",
        needs="a reference model trained without the forget set, and holdout records that no model has seen",
        better="zero",
    ),
    MetricCard(
        name="utility",
        title="Utility",
        meaning="How well the model still answers about what it should keep, asked on records that it was trained on "
        "and that the unlearner never saw (ROUGE-L F1, mean over questions).",
        direction="Higher is better; it should stay where it was before forgetting.",
        range=(0, 100),
        reference="The model before forgetting, and the model trained without the forget set.",
        needs_records=100,
        source=f"{_MUSE}, criterion C4",
        needs="a utility set: records that were trained on and that the unlearner may not use",
        better="higher",
    ),
    MetricCard(
        name="retain_knowledge",
        title="Knowledge of the retain set",
        meaning="How well the model answers about the retain set, which the unlearner may train on (ROUGE-L F1, mean "
        "over questions).",
        direction="Higher is better. Flattering by design, since the unlearner may rehearse these records: utility "
        "is the fair number.",
        range=(0, 100),
        reference="The model before forgetting.",
        needs_records=100,
        source=f"{_MUSE}, section on utility preservation (retain set 1)",
        needs="a retain set with prompts and completions",
        better="higher",
    ),
    MetricCard(
        name="scalability",
        title="Scalability",
        meaning="Utility after the largest of several forget requests of growing size, each forgotten from the same "
        "starting model.",
        direction="Higher is better; a method that scales loses no more on a large request than on a small one.",
        range=(0, 100),
        reference="Utility before forgetting.",
        needs_records=100,
        source=f"{_MUSE}, criterion C5",
        needs="a forgetting method to run again on parts of the forget set of growing size, and a utility set",
        better="higher",
    ),
    MetricCard(
        name="sustainability",
        title="Sustainability",
        meaning="Utility after the last of several forget requests that came one after the other.",
        direction="Higher is better; a sustainable method does not wear the model down request by request.",
        range=(0, 100),
        reference="Utility before the first request.",
        needs_records=100,
        source=f"{_MUSE}, criterion C6",
        needs="a forgetting method to run again on disjoint parts of the forget set, one after the other, and a "
        "utility set",
        better="higher",
    ),
    MetricCard(
        name="forget_nll",
        title="Surprise at the forget set",
        meaning="Mean negative log-likelihood of the forget records, in nats per scored token.",
        direction="Near the reference is good. Lower: the records are still familiar. Much higher: they are singled "
        "out.",
        range=(0, None),
        reference="A model trained without the forget set.",
        needs_records=30,
        source="Cross-entropy; 2.72 (e) times less likely per nat",
        unit="nats per token",
        needs="forget records",
        better="reference",
    ),
    MetricCard(
        name="utility_nll",
        title="Surprise at the utility set",
        meaning="Mean negative log-likelihood of the utility records, in nats per scored token.",
        direction="Lower is better; it should stay where it was before forgetting.",
        range=(0, None),
        reference="The model before forgetting.",
        needs_records=30,
        source="Cross-entropy; 2.72 (e) times less likely per nat",
        unit="nats per token",
        needs="a utility set",
        better="lower",
    ),
    MetricCard(
        name="gibberish",
        title="Gibberish about the forget set",
        meaning="Share of answers and continuations about the forget set that are empty or not language: the same few "
        "words over and over. An empty answer scores zero on every memory test and would pass for perfect forgetting.",
        direction="Lower is better.",
        range=(0, 100),
        reference="The model before forgetting.",
        needs_records=100,
        source=f"Set beside C1 and C2 so that a broken model is not taken for one that forgot; {_MUSE} shows such "
        f"models",
        unit="%",
        needs="forget records to answer or to go on with",
        better="lower",
    ),
    MetricCard(
        name="utility_gibberish",
        title="Gibberish about the utility set",
        meaning="Share of answers and continuations about the utility set that are empty or not language.",
        direction="Lower is better. Where most answers are gibberish, the model is broken.",
        range=(0, 100),
        reference="The model before forgetting.",
        needs_records=100,
        source=f"Set beside C4, as for the forget set; {_MUSE}",
        unit="%",
        needs="utility records to answer or to go on with",
        better="lower",
    ),
    MetricCard(
        name="utility_verbatim",
        title="Recital of the utility set",
        meaning="Given the beginning of a utility record, how much of the rest the model writes word for word "
        "(ROUGE-L F1). "
        "Measured where the utility set has texts and no questions.",
        direction="Higher means that texts that should stay are still there.",
        range=(0, 100),
        reference="The model before forgetting.",
        needs_records=100,
        source=f"The measure of C1 on the utility set; {_MUSE}",
        needs="utility records that are texts",
        better="higher",
    ),
)
