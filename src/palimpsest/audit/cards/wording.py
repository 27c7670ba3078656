"""What C-BOD measures on a multiple-choice set that was asked in other words."""

from __future__ import annotations

from palimpsest.audit.cards.card import MetricCard

_CBOD = "C-BOD, Cohen-Inger et al. 2025 (arXiv:2502.07445)"

CARDS = (
    MetricCard(
        name="reworded_accuracy",
        title="Accuracy on reworded items",
        meaning="Share of a benchmark's items that the model answers rightly, as the benchmark words them (before) and "
        "reworded without change of meaning, options or answer (after).",
        direction="Higher is better; what counts is that it does not fall.",
        range=(0, 100),
        reference="The same model on the benchmark's own wording, item by item.",
        needs_records=500,
        source=f"{_CBOD}, section 3",
        unit="%",
        needs="multiple-choice items",
        better="higher",
    ),
    MetricCard(
        name="wording_drop",
        title="Points lost by rewording",
        meaning="Accuracy on the benchmark's own wording less accuracy on the reworded items, over the same items.",
        direction="Zero is good. Above zero: part of the score is the wording and not the skill.",
        range=(-100, 100),
        reference="Zero: a model that has the skill answers either wording. The interval is for paired shares.",
        needs_records=500,  # 628 see a drop of 5 points at 80% power where 20% of the items change
        source=f"{_CBOD}, section 3; Newcombe 1998, method 10",
        unit="points",
        needs="multiple-choice items",
        better="zero",
    ),
    MetricCard(
        name="wording_drop_relative",
        title="Share of the score lost by rewording",
        meaning="Points lost by rewording, in percent of the score on the benchmark's own wording.",
        direction="Zero is good.",
        range=(None, 100),
        reference="The paper's mean over 26 models on MMLU is 2.15 percent of the score, which is 1.31 points.",
        needs_records=500,
        source=f"{_CBOD}, table 1",
        unit="%",
        needs="multiple-choice items",
        better="zero",
    ),
    MetricCard(
        name="wording_effect",
        title="Lost rather than won",
        meaning="Of the items whose answer changed with the wording, the share that was lost, less one half (Cohen's "
        "g). 0.05 is small, 0.15 medium, 0.25 large.",
        direction="Zero is good: rewording should lose and win alike.",
        range=(-0.5, 0.5),
        reference="Zero: what two rewordings of the same items show against each other.",
        needs_records=25,
        source="Cohen 1988, chapter 5; Clopper-Pearson interval",
        needs="items whose answer changed",
        better="zero",
    ),
    MetricCard(
        name="wording_noise",
        title="Points between two rewordings",
        meaning="The null control: accuracy on one rewording less accuracy on another drawn in the same way.",
        direction="Zero is good. Away from zero, the test is not to be trusted on this model.",
        range=(-100, 100),
        reference="Zero by construction, but for chance.",
        needs_records=500,
        source=f"Control set beside {_CBOD}",
        unit="points",
        needs="multiple-choice items",
        better="zero",
    ),
)
