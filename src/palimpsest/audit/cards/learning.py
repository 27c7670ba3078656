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
    MetricCard(
        name="last_accuracy",
        title="Last accuracy",
        meaning="Right answers among all classes, after the whole stream.",
        direction="Higher is better.",
        range=(0, 100),
        reference="The nearest class mean of the same features, and a linear probe that keeps everything.",
        needs_records=400,  # test examples: the 95% interval of a share then reaches at most 5 points
        source="van de Ven & Tolias 2019 (arXiv:1904.07734), class-incremental",
        unit="percent",
        needs="a stream of tasks with test examples of each class",
        better="higher",
    ),
    MetricCard(
        name="incremental_accuracy",
        title="Average incremental accuracy",
        meaning="The accuracy on the classes met so far, mean over tasks.",
        direction="Higher is better.",
        range=(0, 100),
        reference="Always above the last accuracy where classes add up: never hold one against the other.",
        needs_records=400,  # test examples: the 95% interval of a share then reaches at most 5 points
        source="iCaRL, Rebuffi et al. 2017 (arXiv:1611.07725)",
        unit="percent",
        needs="a stream of tasks with test examples of each class",
        better="higher",
    ),
    MetricCard(
        name="forgetting",
        title="Forgetting",
        meaning="How far each task but the last fell from its best accuracy, mean over tasks.",
        direction="Lower is better.",
        range=(-100, 100),
        reference="More classes to choose from lower it for every learner, even one that forgets nothing.",
        needs_records=400,  # test examples: the 95% interval of a share then reaches at most 5 points
        source="Chaudhry et al. 2018 (arXiv:1801.10112)",
        unit="percent",
        needs="a stream of tasks with test examples of each class",
        better="lower",
    ),
    MetricCard(
        name="backward_transfer",
        title="Backward transfer",
        meaning="What later tasks added to the accuracy on a task since it came, mean over tasks.",
        direction="Higher is better.",
        range=(-100, 100),
        reference="Zero: later tasks changed nothing.",
        needs_records=400,  # test examples: the 95% interval of a share then reaches at most 5 points
        source="GEM, Lopez-Paz & Ranzato 2017 (arXiv:1706.08840)",
        unit="percent",
        needs="a stream of tasks with test examples of each class",
        better="higher",
    ),
)
