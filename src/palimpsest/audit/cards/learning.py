"""How well a learner answers about classes that it has just met."""

from __future__ import annotations

from palimpsest.audit.cards.card import MetricCard

CARDS = (
    MetricCard(
        name="few_shot_accuracy",
        title="Few-shot accuracy",
        meaning="The share of an episode's queries that are answered right, mean over test episodes of classes that "
        "were not trained on.",
        direction="Higher is better.",
        range=(0, 100),
        reference="Guessing, 100 divided by the number of ways; the same comparison without meta-training.",
        needs_records=600,  # episodes: the interval then reaches about 0.8 points for a deviation of 10
        source="the field's protocol, Vinyals et al. 2016 (arXiv:1606.04080)",
        unit="percent",
        needs="test classes with enough examples for an episode",
        better="higher",
    ),
    MetricCard(
        name="known_accuracy",
        title="Accuracy on known classes",
        meaning="The share of right answers to queries that do belong to one of the episode's classes.",
        direction="Higher is better.",
        range=(0, 100),
        reference="To be read beside the recall of none of the classes: always saying none scores 0 here.",
        needs_records=600,
        source="FewRel 2.0, Gao et al. 2019 (arXiv:1910.07124)",
        unit="percent",
        needs="episodes with queries of none of the classes (nota above 0)",
        better="higher",
    ),
    MetricCard(
        name="none_recall",
        title="Recall of none of the classes",
        meaning="The share of queries that belong to none of the episode's classes and are told to.",
        direction="Higher is better.",
        range=(0, 100),
        reference="To be read beside the accuracy on known classes: always saying none scores 100 here.",
        needs_records=600,
        source="FewRel 2.0, Gao et al. 2019 (arXiv:1910.07124)",
        unit="percent",
        needs="episodes with queries of none of the classes (nota above 0)",
        better="higher",
    ),
)
