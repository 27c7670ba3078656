"""UnUnlearning's claim where forgetting is exact by construction: what a model never learned, a definition teaches it.

A small Llama learns axioms, what follows from each property (of four kinds, eight of each, each with two words), and to
work with definitions: ``define w as p q r s . which KIND has w ?``.  Twelve combinations of properties have names and
occur in no definition while it learns that.  A last stage teaches what follows from the names; the *target* gets all
twelve, the *exact* model is the same without six of them, from the same start: exact unlearning.  Then the six are
told again, under a fresh word (alias), under their own name (definition), or split over helper words (chain).  The
answers stand in no prompt: the model has to derive them from what it is permitted to know.

The utility argument: a last model also loses the axioms of one forbidden concept.  That does keep the concept from
being told again, and takes from permitted concepts what needed those axioms.

The negative control takes the description away: in place of the concept's own definition the prompt holds another
concept's, of the same form and length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from palimpsest.audit.answers import multiple_choice
from palimpsest.audit.behaviour import BehaviourScreen
from palimpsest.audit.concepts import HELPER, Concept, Question
from palimpsest.audit.retelling import CONTROL, PLAIN, Asked
from palimpsest.claims import Expect, claim
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.lexicon import invent
from palimpsest.models.kept import trained
from palimpsest.models.lm import LM
from palimpsest.models.screens import DefinitionScreen, NameScreen, StateScreen
from palimpsest.models.train import Recipe

KINDS, PROPERTIES = 4, 8  # of each kind
NAMED, FORBIDDEN, FRESH_WORDS = 12, 6, 30
PHRASINGS = 8  # in which each concept is told to a filter
AGREEMENT = 0.8  # beyond chance: one of four answers that is another one's is enough to be spared
BASE_STEPS, NAME_STEPS, LOSS_STEPS, BATCH = 300, 120, 80, 64
_WORDS = ("define", "as", "which", "has")  # of the forms, and no concept's
_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,  # with the usual 0.02 it takes three times as long
    "tie_word_embeddings": True,
}
Told = tuple[int, ...]  # of each kind, the number of the property
Row = tuple[str, str, int]  # prompt, answer, kind


@claim(
    paper="ununlearning",
    statement=(
        "A model that never learned a concept acts on it once the prompt describes it from permitted parts; taking the "
        "parts away costs permitted concepts; a list of names does not stop the telling, filters that look at what is "
        "told do."
    ),
    paper_says={
        "numbers": "none: a position paper without experiments",
        "its argument": "no unlearner beats never having learned, and even that model performs the concept once told",
    },
    expectations=(  # fixed before anything was tuned; accuracies in percent, chance is 12.5
        Expect("target_plain", at_least=75),  # there is something to forget
        Expect("exact_plain", at_most=30),  # and it is forgotten
        Expect("ability", at_least=75),  # the model can learn from its prompt: combinations never seen in one
        Expect("recovery_alias", at_least=80),  # percent of what was forgotten
        Expect("recovery_definition", at_least=60),
        Expect("exact_other", at_most=30),  # another concept's definition does not do it
        Expect("names_stop_definition", at_least=95),
        Expect("names_stop_alias", at_most=5),
        Expect("behaviour_stops_alias", at_least=90),
        Expect("behaviour_false_alarms", at_most=10),
        Expect("lost_by_permitted", at_least=10),  # points, where the axioms are gone too
    ),
    minutes=3,
    data="generated: 32 properties of 4 kinds with two words each, what follows from each, 12 named combinations",
    note=(
        "Means over six forbidden concepts. A prompt holds one definition: the model need not find out whose it is. "
        "What the loss of axioms costs follows from taking them away by design; how much is what is measured. "
        "Definitions matched as sets (definitions_*) and the probe of states (states_*) are reported beside the filter "
        "that watches behaviour; alarms_near are of permitted definitions that differ in one property. The sheet's "
        "concepts were conjunctions of attributes of entities, answered yes or no; models of this size learned those "
        "by heart or not at all within the time (seen before any figure of this claim), so here each property has "
        "consequences of its own."
    ),
)
def measure(seed: int, mechanism: bool = True, scale: float = 1.0) -> dict[str, float]:
    world = Named(seed)
    base = world.base(scale)
    target = world.named(base, range(NAMED), scale)
    exact = world.named(base, range(FORBIDDEN, NAMED), scale)
    asked = world.asked(range(FORBIDDEN), described=mechanism)
    scores = {way: asked.scores(exact, way, 1) for way in (PLAIN, CONTROL, "definition", "alias", "chain")}
    known = asked.scores(target, PLAIN, 1)
    values = {f"exact_{way or 'plain'}": float(found.mean()) for way, found in scores.items()}
    values["target_plain"] = float(known.mean())
    values["target_alias"] = float(asked.scores(target, "alias", 1).mean())
    values["ability"] = float(world.asked(range(FORBIDDEN, NAMED)).scores(exact, "alias", 1).mean())
    for way in ("definition", "alias", "chain"):
        found = (scores[way].mean() - scores[PLAIN].mean()) / max(known.mean() - scores[PLAIN].mean(), 1.0)
        values[f"recovery_{way}"] = 100 * float(found)
    return values | world.filtered(exact, asked) | world.without_its_axioms(exact, scale)


@dataclass(frozen=True)
class Named:
    """The words, the truth and the rows of one seed."""

    seed: int

    @cached_property
    def words(self) -> list[str]:
        count = KINDS + 3 * KINDS * PROPERTIES + NAMED + FRESH_WORDS
        return [word.lower() for word in invent(count, 2, numpy_rng(self.seed, "ununlearning words"))]

    @property
    def kinds(self) -> list[str]:
        return self.words[:KINDS]

    @cached_property
    def properties(self) -> np.ndarray:
        """(KINDS, PROPERTIES, 2): each property's two words, which mean the same."""
        size = 2 * KINDS * PROPERTIES
        return np.array(self.words[KINDS : KINDS + size]).reshape(KINDS, PROPERTIES, 2)

    @cached_property
    def follows(self) -> np.ndarray:
        """(KINDS, PROPERTIES): what follows from each property."""
        first = KINDS + 2 * KINDS * PROPERTIES
        return np.array(self.words[first : first + KINDS * PROPERTIES]).reshape(KINDS, PROPERTIES)

    @property
    def names(self) -> list[str]:
        return self.words[-NAMED - FRESH_WORDS : -FRESH_WORDS]

    @property
    def fresh(self) -> list[str]:
        return [*self.words[-FRESH_WORDS:], HELPER]

    @cached_property
    def concepts(self) -> list[Told]:
        """The named combinations: no two share more than half of their properties."""
        rng, found = numpy_rng(self.seed, "ununlearning concepts"), list[Told]()
        while len(found) < NAMED:
            told = self._any(rng)
            if all(_shared(told, other) <= KINDS // 2 for other in found):
                found.append(told)
        return found

    def permitted(self, rng: np.random.Generator) -> Told:
        """A combination that has no name."""
        while (told := self._any(rng)) in self.concepts:
            pass
        return told

    def near(self, told: Told, rng: np.random.Generator) -> Told:
        """A combination without a name that differs in one property."""
        while True:
            kind, other = int(rng.integers(KINDS)), int(rng.integers(PROPERTIES))
            found = (*told[:kind], other, *told[kind + 1 :])
            if found not in self.concepts:
                return found

    def definition(self, word: str, told: Told, rng: np.random.Generator) -> str:
        return f"define {word} as {' '.join(self._said(kind, told, rng) for kind in rng.permutation(KINDS).tolist())} ."

    def mosaic(self, word: str, told: Told, rng: np.random.Generator) -> tuple[str, str]:
        """The same by way of a helper word, so that no statement holds the whole."""
        first, *rest = (self._said(kind, told, rng) for kind in rng.permutation(KINDS).tolist())
        helper = str(rng.choice(self.fresh[:-1]))
        return f"define {helper} as {first} .", f"define {word} as {' '.join([helper, *rest])} ."

    @cached_property
    def start(self) -> LM:
        texts = [" ".join([*self.words, *_WORDS, HELPER]), " ? ."]
        texts += [f" {word} has {word} ?" for word in [*self.words, HELPER]] * 3
        return LM.build(texts * 3, _CONFIG, vocab_size=1024, max_length=48, seed=self.seed)

    def base(self, scale: float) -> LM:
        """Axioms, and definitions of combinations that have no name."""
        rng = numpy_rng(self.seed, "ununlearning base")
        rows = [self._permitted_row(rng) for _ in range(round(24_000 * scale))]
        return self._trained(self.start, rows, max(30, round(BASE_STEPS * scale)), 3e-3)

    def named(self, base: LM, concepts: Sequence[int], scale: float) -> LM:
        """`base` after the stage that teaches names, of the given concepts only; what is permitted is rehearsed."""
        rng = numpy_rng(self.seed, "ununlearning names")
        rows = []
        for concept in range(NAMED):  # the same draws whichever are taught
            rehearsed = [self._permitted_row(rng) for _ in range(200)]
            own = [self._row(self.names[concept], self.concepts[concept], kind) for kind in range(KINDS)] * 50
            rows += rehearsed + (own if concept in concepts else [])
        return self._trained(base, rows, max(20, round(NAME_STEPS * scale)), 1e-3)

    def asked(self, concepts: Sequence[int], described: bool = True) -> Asked:
        """Every kind of every concept.  Unless `described`, each is told with its successor's definition."""
        rng = numpy_rng(self.seed, "ununlearning asked", *concepts)
        found = []
        for place, concept in enumerate(concepts):
            told = self.concepts[concept if described else concepts[(place + 1) % len(concepts)]]
            name = self.names[concept]
            rows = [self._row(name, self.concepts[concept], kind) for kind in range(KINDS)]
            questions = tuple(Question(prompt, answer, self._options(kind)) for prompt, answer, kind in rows)
            chain = self.mosaic(name, told, rng)
            found.append(Concept(name, questions, (self.definition(name, told, rng),), chain=chain))
        whole = Asked.draw(found, 10_000, 0, self.seed)
        return Asked(whole.concepts, whole.owner, whole.questions, 0, self.seed, joint=" ")

    def filtered(self, lm: LM, asked: Asked) -> dict[str, float]:
        """What each filter stops of what is told about forbidden and about permitted concepts, in percent."""
        rng = numpy_rng(self.seed, "ununlearning filter")
        names = NameScreen(tuple(concept.name for concept in asked.concepts))
        values = {
            f"names_stop_{way}": 100 * float(names.stops(lm, [str(text) for text in asked.prompts(way)]).mean())
            for way in ("definition", "alias")
        }
        synonyms = {str(second): str(first) for first, second in self.properties.reshape(-1, 2)}
        found: dict[str, list[float]] = {}
        for told in self.concepts[:FORBIDDEN]:
            near = [self.near(told, rng) for _ in range(2 * PHRASINGS)]
            texts = {
                "stops_alias": [self.definition(HELPER, told, rng) for _ in range(PHRASINGS)],
                "stops_chain": [" ".join(self.mosaic(HELPER, told, rng)) for _ in range(PHRASINGS)],
                "false_alarms": [self.definition(HELPER, self.permitted(rng), rng) for _ in range(4 * PHRASINGS)],
                "alarms_near": [self.definition(HELPER, other, rng) for other in near],
            }
            words = tuple(str(self.properties[kind, place, 0]) for kind, place in enumerate(told))
            probes = [f" {self._row(HELPER, told, kind)[0]}" for kind in range(KINDS)]
            options = [self._options(kind) for kind in range(KINDS)]
            screens: dict[str, Any] = {
                "definitions": DefinitionScreen((words,), _WORDS, synonyms),
                "states": self._states(lm, told, rng),
                "behaviour": BehaviourScreen(probes, np.array(told), options, AGREEMENT),
            }
            for name, screen in screens.items():
                for what, prompts in texts.items():
                    found.setdefault(f"{name}_{what}", []).append(screen.stops(lm, prompts).mean())
        return values | {name: 100 * float(np.mean(rates)) for name, rates in found.items()}

    def without_its_axioms(self, exact: LM, scale: float) -> dict[str, float]:
        """`exact` after the axioms of the first concept became noise: what still works when told, and what is lost.

        Of that concept, of permitted definitions that need one of these axioms, and of those that need another one.
        """
        rng = numpy_rng(self.seed, "ununlearning axioms")
        gone = self.concepts[0]
        rows = [self._permitted_row(rng) for _ in range(3000)]
        rows += [self._defined(self.near(gone, rng), turn % KINDS, rng) for turn in range(1000)]
        rows = [
            (prompt, str(rng.choice(self.follows[kind])) if answer == self.follows[kind, gone[kind]] else answer, kind)
            for prompt, answer, kind in rows
        ]
        after = self._trained(exact, rows, max(10, round(LOSS_STEPS * scale)), 1e-3)
        tried: dict[str, list[Row]] = {"forbidden": [], "permitted": [], "others": []}
        for turn in range(120):
            kind, told = turn % KINDS, self.permitted(rng)
            for name, place in (("permitted", gone[kind]), ("others", (gone[kind] + 1) % PROPERTIES)):
                tried[name].append(self._defined((*told[:kind], place, *told[kind + 1 :]), kind, rng))
            tried["forbidden"].append(self._defined(gone, kind, rng))
        values: dict[str, float] = {}
        for name, questions in tried.items():
            before, now = (self._right(lm, questions) for lm in (exact, after))
            values |= {f"axioms_gone_{name}": now, f"lost_by_{name}": before - now}
        return values

    def _states(self, lm: LM, told: Told, rng: np.random.Generator) -> StateScreen:
        """Made from definitions of the concept and of permitted ones, some near; mosaics are none of them."""
        inside = [self.definition(HELPER, told, rng) for _ in range(40)]
        outside = [self.definition(HELPER, self.permitted(rng), rng) for _ in range(80)]
        outside += [self.definition(HELPER, self.near(told, rng), rng) for _ in range(80)]
        return StateScreen.fit(lm, inside, outside)

    def _right(self, lm: LM, rows: Sequence[Row]) -> float:
        """Percent answered rightly."""
        options = [self._options(kind) for _, _, kind in rows]
        right = [row.index(answer) for row, (_, answer, _) in zip(options, rows, strict=True)]
        spaced = [[f" {option}" for option in row] for row in options]
        return 100 * float(multiple_choice(lm, [prompt for prompt, _, _ in rows], spaced, right).mean())

    def _permitted_row(self, rng: np.random.Generator) -> Row:
        """An axiom (one of three) or a question behind a definition."""
        told, kind = self.permitted(rng), int(rng.integers(KINDS))
        if rng.random() < 1 / 3:
            return self._row(self._said(kind, told, rng), told, kind)
        return self._defined(told, kind, rng)

    def _defined(self, told: Told, kind: int, rng: np.random.Generator) -> Row:
        word = str(rng.choice(self.fresh))
        prompt, answer, _ = self._row(word, told, kind)
        return f"{self.definition(word, told, rng)} {prompt}", answer, kind

    def _row(self, word: str, told: Told, kind: int) -> Row:
        return f"which {self.kinds[kind]} has {word} ?", str(self.follows[kind, told[kind]]), kind

    def _options(self, kind: int) -> tuple[str, ...]:
        return tuple(map(str, self.follows[kind]))

    def _said(self, kind: int, told: Told, rng: np.random.Generator) -> str:
        return str(self.properties[kind, told[kind], int(rng.integers(2))])

    def _any(self, rng: np.random.Generator) -> Told:
        return tuple(rng.integers(PROPERTIES, size=KINDS).tolist())

    def _trained(self, lm: LM, rows: Sequence[Row], steps: int, lr: float) -> LM:
        prompts, answers = [row[0] for row in rows], [row[1] for row in rows]
        table = Dataset.from_dict({"prompt": prompts, "completion": answers})
        return trained(lm, table, Recipe(steps=steps, lr=lr, batch_size=BATCH, seed=self.seed), progress=False)


def _shared(told: Told, other: Told) -> int:
    return sum(a == b for a, b in zip(told, other, strict=True))
