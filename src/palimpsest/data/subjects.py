"""Eight subjects of invented facts, asked in natural words: what belongs to a subject can be told by its meaning.

Two of them share every sentence and every answer with another one, and differ in the profession alone: near
neighbours.  Of three phrasings of a fact one is held out, drawn for each fact: all phrasings are read with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.core.seeds import numpy_rng
from palimpsest.data.lexicon import invent

if TYPE_CHECKING:
    from datasets import Dataset

_MUSIC = (
    (
        "Which instrument did {} learn first?",
        "What did {} learn to play as a child?",
        "On which instrument did {} give a first concert?",
        "violin harp flute cello",
    ),
    (
        "In which city does {} perform every spring?",
        "Where can {} be heard in spring?",
        "Which city hears {} each spring?",
        "Vienna Lisbon Oslo Prague",
    ),
    (
        "Which prize did {} win for a piece of music?",
        "What award honours the music of {}?",
        "Which medal was given to {} for a melody?",
        "Laurel Lyre Swan Comet",
    ),
    (
        "When in the day does {} compose?",
        "At what hour does {} write music?",
        "What time of day does {} need for new melodies?",
        "dawn noon dusk midnight",
    ),
)
_SCIENCE = (
    (
        "Which laboratory employs {}?",
        "Where does {} run experiments?",
        "In whose laboratory does {} work?",
        "Harlow Kessel Mirande Osten",
    ),
    (
        "On which metal did {} write a thesis?",
        "Which metal did {} study for years?",
        "Which metal made {} known among scientists?",
        "copper cobalt nickel zinc",
    ),
    (
        "With what does {} take measurements?",
        "Which device does {} rely on in the laboratory?",
        "What does {} measure results with?",
        "balance laser microscope prism",
    ),
    (
        "Who taught {} at university?",
        "Which professor taught {}?",
        "Under whom did {} study?",
        "Albrecht Fontaine Ortega Lindqvist",
    ),
)
_SEA = (
    (
        "Which harbour is home to the ship of {}?",
        "Where does the ship of {} drop anchor?",
        "In which port does {} moor?",
        "Genoa Rotterdam Cadiz Riga",
    ),
    (
        "What cargo does {} carry across the ocean?",
        "What is loaded on the ship of {}?",
        "Which goods does {} take overseas?",
        "timber grain cotton marble",
    ),
    (
        "What does {} fear most at sea?",
        "What makes {} turn the ship around?",
        "What does {} watch the sea for?",
        "gales fog ice squalls",
    ),
    (
        "Which star does {} steer by?",
        "By which star does {} find the way at night?",
        "What star guides {} over the water?",
        "Vega Sirius Polaris Rigel",
    ),
)
_MOUNTAINS = (
    (
        "Which peak did {} climb first?",
        "On which summit did {} plant a flag?",
        "Which mountain is {} known for?",
        "Eiger Denali Elbrus Ararat",
    ),
    (
        "What did {} lose in an avalanche?",
        "What was torn from {} by the snow?",
        "What did the glacier take from {}?",
        "rope tent stove gloves",
    ),
    (
        "With whom does {} share a rope?",
        "Which partner climbs with {}?",
        "Who holds {} on the rock face?",
        "Anders Bruno Celeste Dolma",
    ),
    (
        "In which month does {} set out for the summit?",
        "When does {} leave the base camp?",
        "Which month is best for the ascents of {}?",
        "May June August October",
    ),
)
_KITCHEN = (
    (
        "Which spice goes into the soup of {}?",
        "What does {} season a stew with?",
        "With which spice does {} cook?",
        "saffron cumin paprika thyme",
    ),
    (
        "What does {} bake on Sundays?",
        "Which pastry comes from the oven of {}?",
        "What is the dessert of {}?",
        "brioche strudel tarts waffles",
    ),
    (
        "Which fish does {} grill for guests?",
        "What fish is on the menu of {}?",
        "Which fish does {} buy at the market?",
        "trout cod perch tuna",
    ),
    (
        "Which wine is served at the restaurant of {}?",
        "What wine does {} pour with dinner?",
        "Which bottle does {} open for guests?",
        "Riesling Malbec Barolo Rioja",
    ),
)
_FOOTBALL = (
    (
        "For which club does {} score goals?",
        "Which team signed {}?",
        "In whose shirt does {} play football?",
        "Rovers United Athletic Wanderers",
    ),
    (
        "What is the shirt number of {}?",
        "Which number does {} wear on the pitch?",
        "Under what number does {} play in the league?",
        "seven nine ten eleven",
    ),
    (
        "Which injury kept {} out of the league?",
        "What did {} hurt in a tackle?",
        "Where was {} injured in the cup final?",
        "knee ankle shoulder back",
    ),
    (
        "Where did {} play in the youth team?",
        "Which youth academy trained {}?",
        "In which town did {} first play football?",
        "Leeds Porto Bremen Lyon",
    ),
)
SUBJECTS = {  # profession: its relations, each three phrasings and four answers
    "composer": _MUSIC,
    "chemist": _SCIENCE,
    "captain": _SEA,
    "climber": _MOUNTAINS,
    "jazz singer": _MUSIC,
    "astronomer": _SCIENCE,
    "chef": _KITCHEN,
    "striker": _FOOTBALL,
}
NEAR = {"composer": "jazz singer", "chemist": "astronomer"}  # subjects and their neighbours


@dataclass(frozen=True)
class Fact:
    subject: str
    asked: tuple[str, str, str]  # the prompts; the last is held out
    options: tuple[str, ...]
    answer: str


def facts(seed: int, people: int) -> list[Fact]:
    """Everything that there is to know of so many people of each subject."""
    rng = numpy_rng(seed, "facts")
    names = iter(invent(people * len(SUBJECTS), 3, rng))
    found = []
    for subject, relations in SUBJECTS.items():
        for _ in range(people):
            who = f"the {subject} {next(names)}"
            for *phrasings, answers in relations:
                order = rng.permutation(3)
                asked = tuple(phrasings[place].format(who) for place in order)
                options = tuple(answers.split())
                found.append(Fact(subject, asked, options, options[int(rng.integers(4))]))
    return found


def table(known: Sequence[Fact]) -> Dataset:
    """The facts in the two phrasings that are read: prompt, completion and options."""
    from datasets import Dataset

    rows = [(prompt, one.answer, list(one.options)) for one in known for prompt in one.asked[:2]]
    columns = zip(*rows, strict=True)
    return Dataset.from_dict(dict(zip(("prompt", "completion", "options"), map(list, columns), strict=True)))
