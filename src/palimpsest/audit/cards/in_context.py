"""How well a learner answers from its context, about tasks that were not trained on."""

from __future__ import annotations

from palimpsest.audit.cards.card import MetricCard


def _accuracy(name: str, title: str, meaning: str, reference: str, source: str, needs: str) -> MetricCard:
    return MetricCard(
        name=name,
        title=title,
        meaning=meaning,
        direction="Higher is better.",
        range=(0, 100),
        reference=reference,
        needs_records=0,
        source=source,
        unit="percent",
        needs=needs,
        better="higher",
    )


def _distance(name: str, title: str, meaning: str, reference: str) -> MetricCard:
    return MetricCard(
        name=name,
        title=title,
        meaning=meaning,
        direction="Lower is better.",
        range=(0, None),
        reference=reference,
        needs_records=100,
        source="Panwar et al. 2024 (arXiv:2306.04891)",
        needs="functions that the yardstick is known for",
        better="lower",
    )


_GPICL = "Kirsch et al. 2022 (arXiv:2212.04458)"
_LATE = "over the last quarter of the sequences"
_SQUARED = "Median over prompts of the squared distance between the network's answers and"

CARDS = (
    _accuracy(
        "seen_task_accuracy",
        "Accuracy on the training's tasks",
        f"The share of right answers {_LATE}, on tasks of the training with examples that were held out.",
        "To be read beside the accuracy on new tasks: if that stays at chance, tasks were remembered.",
        _GPICL,
        "a base set of labelled examples",
    ),
    _accuracy(
        "unseen_task_accuracy",
        "Accuracy on new tasks",
        f"The share of right answers {_LATE}, on fresh projections and permutations of held-out examples.",
        "One nearest neighbour on the same context; chance is 100 divided by the number of labels.",
        _GPICL,
        "a base set of labelled examples",
    ),
    _accuracy(
        "other_class_accuracy",
        "Accuracy on classes never seen",
        f"The share of right answers {_LATE}, on tasks made of classes that no training example belonged to.",
        "Chance, 100 divided by the number of labels.",
        _GPICL,
        "classes that are left for testing",
    ),
    _distance(
        "distance_to_bayes",
        "Distance to the Bayesian predictor",
        f"{_SQUARED} the exact posterior mean, averaged over the points of a prompt.",
        "0 is the best that any predictor can do; compare with the untrained network.",
    ),
    _distance(
        "distance_to_least_squares",
        "Distance to least squares",
        f"{_SQUARED} those of least squares on the same pairs.",
        "Larger than the distance to the Bayesian predictor where the network uses its prior.",
    ),
    _distance(
        "distance_to_truth",
        "Distance to the function",
        f"{_SQUARED} the function itself.",
        "Not 0 for any predictor: the first points say nothing about the function.",
    ),
    _accuracy(
        "prompt_accuracy",
        "Accuracy behind distilled demonstrations",
        "The share of queries answered right behind the vectors, mean over held-out tasks.",
        "Before is the model without demonstrations, the reference the model with all of them as text.",
        "Li et al. 2024 (arXiv:2403.06914)",
        "held-out tasks with options",
    ),
)
