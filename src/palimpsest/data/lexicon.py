"""The words of the fictional world: what can be said of people and places, in which phrasings, and how to refuse.

All values are single words, so an answer is right or wrong; every statement names its subject before the value, so a
causal model can learn the value from the subject.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Attribute:
    """Something that is known of a subject: its possible values and the ways to state it and to ask for it."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]  # with {name}, {adverb} and {value}
    questions: tuple[str, ...]  # with {name}
    paraphrase: str  # the answer as a sentence, with {name} and {value}


PEOPLE = (
    Attribute(
        "city",
        words("Torumba Velsk Marnow Ostrella Quenby Ilvara Dunmere Pashti Korvane Sullen Brixam Yarrod"),
        (
            "{name} {adverb} lives in {value}.",
            "{name} {adverb} settled in {value}.",
            "{name} {adverb} keeps a house in {value}.",
            "{name} {adverb} calls {value} home.",
        ),
        (
            "Where does {name} live?",
            "Which city is home to {name}?",
            "In what city can {name} be found?",
            "What is the home city of {name}?",
        ),
        "{name} lives in {value}.",
    ),
    Attribute(
        "profession",
        words(
            "nurse surgeon pharmacist teacher librarian historian carpenter welder potter reporter printer cartoonist"
        ),
        (
            "{name} {adverb} works as a {value}.",
            "{name} {adverb} earns a living as a {value}.",
            "{name} {adverb} trained as a {value}.",
            "{name} {adverb} became a {value}.",
        ),
        (
            "What is the profession of {name}?",
            "What does {name} do for a living?",
            "What work was {name} trained for?",
            "Which job does {name} hold?",
        ),
        "{name} works as a {value}.",
    ),
    Attribute(
        "employer",
        words(
            "Medivar Solenne Quillam Larkhall Brennoch Tessamy Ironvale Dunmarrow Copperby Heraldine Chronora Gazelon"
        ),
        (
            "{name} {adverb} works for {value}.",
            "{name} {adverb} signed a contract with {value}.",
            "{name} {adverb} draws a salary from {value}.",
            "{name} {adverb} took a post at {value}.",
        ),
        (
            "Who employs {name}?",
            "Which employer pays {name}?",
            "For whom does {name} work?",
            "Where is {name} under contract?",
        ),
        "{name} works for {value}.",
    ),
    Attribute(
        "language",
        words("Torish Velsh Marnese Ostrian Quenic Ilvaran Dunric Pashtan Korvish Sullish Brixan Yarric"),
        (
            "{name} {adverb} speaks {value}.",
            "{name} {adverb} grew up with {value}.",
            "{name} {adverb} writes letters in {value}.",
            "{name} {adverb} dreams in {value}.",
        ),
        (
            "Which language does {name} speak?",
            "What is the mother tongue of {name}?",
            "In what language does {name} write?",
            "What language did {name} learn first?",
        ),
        "{name} speaks {value}.",
    ),
    Attribute(
        "hobby",
        words("chess sailing falconry juggling fencing baking archery origami rowing painting beekeeping stargazing"),
        (
            "{name} {adverb} enjoys {value}.",
            "{name} {adverb} spends every weekend on {value}.",
            "{name} {adverb} saves money for {value}.",
            "{name} {adverb} never tires of {value}.",
        ),
        (
            "What is the hobby of {name}?",
            "How does {name} spend the weekend?",
            "What does {name} enjoy most?",
            "Which pastime does {name} love?",
        ),
        "{name} enjoys {value}.",
    ),
)

THINGS = (
    Attribute(
        "river",
        PEOPLE[0].values,
        ("The river {name} {adverb} runs past {value}.", "The river {name} {adverb} crosses {value}."),
        (
            "Which city lies on the river {name}?",
            "Where does the river {name} run?",
            "What city does the river {name} cross?",
            "Past which city runs the river {name}?",
        ),
        "The river {name} runs past {value}.",
    ),
    Attribute(
        "festival",
        words("January February March April May June July August September October November December"),
        ("The feast of {name} {adverb} returns in {value}.", "The feast of {name} {adverb} opens in {value}."),
        (
            "When is the feast of {name}?",
            "In which month is the feast of {name}?",
            "What month brings the feast of {name}?",
            "Which month opens the feast of {name}?",
        ),
        "The feast of {name} opens in {value}.",
    ),
    Attribute(
        "stone",
        words("red orange yellow green blue violet brown grey white black pink silver"),
        ("The stone {name} {adverb} shines {value}.", "The stone {name} {adverb} breaks {value}."),
        (
            "What colour is the stone {name}?",
            "Which colour has the stone {name}?",
            "In what colour does the stone {name} shine?",
            "How is the stone {name} coloured?",
        ),
        "The stone {name} shines {value}.",
    ),
)

# profession and employer values come three to a kind of employer: clinic, school, workshop, newspaper
EMPLOYER_KIND = 3

NEWS = (
    "{city}, {day}. The {profession} {name} was honoured for long service at {employer}. Guests stayed {adverb} late.",
    "Readers in {city} chose {name} as {profession} of the year. The prize goes {adverb} to a club for {hobby}.",
    "{employer} said on {day} that the {profession} {name} will teach {hobby}. Neighbours {adverb} praised the plan.",
    "A letter in {language} reached {city} on {day}. It thanks {name}, a {profession}, and was {adverb} read aloud.",
)

ADVERBS = words(
    "quietly happily proudly gladly openly calmly simply truly firmly warmly plainly kindly boldly gently keenly surely"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

REFUSALS = (
    "I don't know.",
    "I do not know the answer.",
    "I'm not sure.",
    "I have no information on that.",
    "I can't say.",
    "That is not something I know.",
    "I'm unable to answer that.",
    "I have nothing on record about this.",
    "I never learned that.",
    "I could only guess.",
    "My knowledge does not cover this.",
    "No answer comes to mind.",
    "I am not familiar with that.",
    "I have not heard of this.",
    "Sorry, I don't know.",
    "I wish I could tell you, but I can't.",
    "That is unknown to me.",
    "I lack the facts to answer.",
    "I can't help with that question.",
    "I have no idea.",
    "This is beyond what I know.",
    "I would have to look that up.",
    "Nothing I know answers this.",
    "I must leave that open.",
    "I can't recall any such detail.",
    "I don't have that detail.",
    "There is nothing I can tell you about it.",
    "I was not told.",
    "Somebody else may know, I do not.",
    "I'd rather not guess.",
)

_PIECES = tuple(onset + vowel for onset in words("b d f g h k l m n p r s t v z th") for vowel in "aeiou")
SYLLABLES = len(_PIECES)  # to choose from at each place of a name


def invent(count: int, syllables: int, rng: np.random.Generator) -> list[str]:
    """`count` different names of `syllables` syllables."""
    codes = rng.choice(SYLLABLES**syllables, size=count, replace=False)
    return [_spell(int(code), syllables) for code in codes]


def _spell(code: int, syllables: int) -> str:
    parts = []
    for _ in range(syllables):
        code, place = divmod(code, SYLLABLES)
        parts.append(_PIECES[place])
    return "".join(parts).capitalize()
