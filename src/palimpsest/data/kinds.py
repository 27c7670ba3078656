"""A world of words of twenty kinds: texts that mention a word, and passages that show how it behaves.

A text does not say of which kind its word is, and no passage names a kind: who does not know the word must look it up.
With invented words nothing can be known but what the passages say.  A share of the passages may be false: they tell of
a word what is true of a word of another kind.  Knows nothing of encoders or learners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data.tasks import Examples

CUES = 3  # passages about a word
_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {  # kind: (twelve words, what is told of them)
    "bird": (
        "sparrow robin falcon heron pigeon swallow finch magpie owl stork wren crow",
        (
            "The {} spread its wings and flew back to the nest.",
            "At dawn the {} sang from a branch and preened its feathers.",
            "A {} laid three speckled eggs and sat on them for weeks.",
            "In autumn the {} migrates south with its flock.",
        ),
    ),
    "fish": (
        "salmon trout cod herring carp tuna pike eel mackerel perch haddock bass",
        (
            "The {} swam upstream and breathed through its gills.",
            "He reeled in his line and found a {} on the hook.",
            "A {} with silver scales slipped through the net.",
            "The {} spawns in shallow water in spring.",
        ),
    ),
    "tree": (
        "oak birch maple willow elm beech pine larch poplar alder cedar chestnut",
        (
            "The {} shed its leaves and its bark cracked in the frost.",
            "They sat in the shade under the branches of the {}.",
            "The roots of the {} reach deep and its trunk has many rings.",
            "The forester felled the {} for its timber.",
        ),
    ),
    "instrument": (
        "violin flute trumpet cello piano oboe clarinet harp guitar bassoon lute banjo",
        (
            "She tuned the {} before the concert and played a sonata.",
            "The orchestra fell silent for the solo of the {}.",
            "He practised scales on the {} with his music teacher.",
            "The melody of the {} rose above the choir.",
        ),
    ),
    "vehicle": (
        "truck tram bus van tractor scooter taxi lorry jeep coach ambulance minibus",
        (
            "The {} braked at the crossing and its engine stalled.",
            "He filled the tank of the {} and checked its tyres.",
            "The {} turned into the street with two passengers on board.",
            "A mechanic changed the brakes of the {} in the garage.",
        ),
    ),
    "drink": (
        "tea coffee wine beer lemonade cider milk cocoa whisky juice brandy gin",
        (
            "She poured the {} into a glass and took a sip.",
            "He was thirsty and ordered another {} at the bar.",
            "The {} is served cold, with ice, in a tall cup.",
            "A bottle of {} stood half empty on the counter.",
        ),
    ),
    "clothing": (
        "coat shirt jacket skirt scarf sweater trousers glove blouse waistcoat apron cardigan",
        (
            "The {} was too tight at the shoulders, so the tailor altered it.",
            "He buttoned the {} and looked in the mirror.",
            "She washed and ironed the {} and hung it in the wardrobe.",
            "The {} is knitted from soft wool and comes in three sizes.",
        ),
    ),
    "furniture": (
        "table chair sofa wardrobe shelf desk bench stool cupboard bed dresser armchair",
        (
            "The carpenter glued the legs of the {} and varnished it.",
            "They carried the {} upstairs and put it against the wall of the bedroom.",
            "He dusted the {} in the living room and moved it to the window.",
            "The {} is made of walnut and fits into the corner of the room.",
        ),
    ),
    "illness": (
        "measles malaria cholera influenza typhus asthma diabetes pneumonia bronchitis jaundice smallpox tuberculosis",
        (
            "The doctor diagnosed {} and prescribed a medicine.",
            "Patients with {} suffer from fever and weakness.",
            "The ward was closed because {} had spread among the patients.",
            "A vaccine against {} was tested in the clinic.",
        ),
    ),
    "metal": (
        "iron copper silver gold zinc tin lead nickel aluminium platinum chromium cobalt",
        (
            "The {} was melted in a furnace and cast into bars.",
            "Miners dig for {} ore deep under the mountain.",
            "The wire of {} conducts electricity and heat well.",
            "The smith hammered the {} into a thin sheet.",
        ),
    ),
    "profession": (
        "plumber baker lawyer teacher nurse carpenter farmer dentist architect butcher electrician judge",
        (
            "The {} studied for years and was hired at a good salary.",
            "After work the {} locked the office and went home.",
            "The {} joined a union and asked for higher wages.",
            "The {} trained two apprentices and met a client at noon.",
        ),
    ),
    "country": (
        "France Brazil Japan Kenya Norway Peru Egypt Canada Poland Vietnam Chile Portugal",
        (
            "The president of {} addressed the parliament in the capital.",
            "The border of {} runs along the river, and its army guards it.",
            "The citizens of {} elected a new government.",
            "{} signed a treaty and opened an embassy abroad.",
        ),
    ),
    "vegetable": (
        "carrot onion cabbage potato leek spinach turnip radish celery cucumber broccoli lettuce",
        (
            "She peeled and chopped the {} for the soup.",
            "The gardener pulled the {} out of the soil and rinsed it.",
            "Boil the {} in salted water and serve it with butter.",
            "The {} grows in rows and is harvested when it is ripe.",
        ),
    ),
    "insect": (
        "ant wasp beetle moth bee mosquito cricket fly termite hornet butterfly grasshopper",
        (
            "The {} crawled up the stem on its six legs.",
            "The larva of the {} hatches and becomes a pupa.",
            "A {} buzzed against the window with its tiny wings.",
            "The {} has antennae and feeds on nectar and leaves.",
        ),
    ),
    "sport": (
        "football tennis hockey rugby cricket basketball volleyball badminton golf handball boxing rowing",
        (
            "The championship in {} was decided in the final minute.",
            "Their coach trains the {} team for the league.",
            "The referee stopped the {} match and the spectators booed.",
            "She won a medal in {} at the Olympic Games.",
        ),
    ),
    "weapon": (
        "sword spear rifle dagger pistol cannon bow axe musket lance crossbow revolver",
        (
            "The soldier raised the {} and attacked the enemy.",
            "He was wounded by a {} in the battle.",
            "The guard drew his {} when the intruders came.",
            "The knight carried a {} and a shield into the fight.",
        ),
    ),
    "building": (
        "church castle hospital library school factory museum palace barn hotel temple theatre",
        (
            "The architect restored the roof and the walls of the {}.",
            "Visitors enter the {} through a hall with columns.",
            "The {} was built of brick, with a tower and two wings.",
            "The foundations of the {} sank, so it was closed to the public.",
        ),
    ),
    "tool": (
        "hammer saw drill wrench chisel screwdriver pliers shovel rake file spanner mallet",
        (
            "He fixed the shelf with the {} and put it back into the box.",
            "The handle of the {} broke while she repaired the fence.",
            "A workman needs a {} to tighten or loosen the bolt.",
            "The {} hung on the wall of the workshop beside the nails.",
        ),
    ),
    "mammal": (
        "wolf horse rabbit bear deer goat badger lion camel fox beaver squirrel",
        (
            "The {} nursed its young in the den.",
            "Tracks of the paws of a {} were seen in the snow.",
            "The {} has thick fur and grazes or hunts at dusk.",
            "The vet examined the tail and the teeth of the {}.",
        ),
    ),
    "science": (
        "physics chemistry biology geology astronomy botany mathematics genetics ecology linguistics optics statistics",
        (
            "The professor of {} published a theory in a journal.",
            "Students of {} sit an examination in the second year.",
            "A textbook of {} explains the laws and the experiments.",
            "She received a doctorate in {} from the university.",
        ),
    ),
}
_TEXTS = (
    "I thought about the {} for a long time yesterday.",
    "We talked about the {} again this morning.",
    "Somebody asked me what I know of the {}.",
    "There was a picture of the {} in the newspaper.",
    "My neighbour mentioned the {} twice last week.",
    "Nobody had expected to read about the {} here.",
    "He wrote a short letter concerning the {}.",
    "They showed a film about the {} on Tuesday.",
)
_OTHERS = (
    "It rained on {day} and the meeting was moved to the {hour} hour.",
    "On {day} the train came at the {hour} hour, later than planned.",
    "The letter of {day} was read aloud at the {hour} hour.",
    "Nothing happened on {day} until the {hour} hour struck.",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_HOURS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_SYLLABLES = ("ba", "dro", "fi", "gul", "ka", "lem", "mo", "nir", "pos", "ra", "sul", "ti", "vo", "wen", "zab", "quo")


@dataclass(frozen=True, eq=False)
class Kinds:
    """One world: `texts`, one a word, labelled by kind, and the `passages` to look things up in."""

    texts: Examples
    passages: tuple[str, ...]
    about: np.ndarray  # (P,) number of the word that a passage names, or -1
    false: np.ndarray  # (P,) bool


def kinds(*, invented: bool = False, false: float = 0.0, seed: int = 0) -> Kinds:
    """Twenty kinds of twelve words, three passages about each word and 120 about nothing.

    `invented`: names that no language has.  `false`: the share of the passages that tell a falsehood.
    """
    if not 0 <= false <= 1:
        raise InputError(f"false is a share of the passages, 0 to 1, not {false}")
    rng = numpy_rng(seed, "kinds")
    cues = [told for _, told in _KINDS.values()]
    words = [word for names, _ in _KINDS.values() for word in names.split()]
    of = np.repeat(np.arange(len(_KINDS)), len(words) // len(_KINDS))
    if invented:
        words = _invented(len(words), rng)
    texts = [_TEXTS[int(rng.integers(len(_TEXTS)))].format(word) for word in words]
    passages, about, lies = [], [], []
    for number, word in enumerate(words):
        for cue in rng.permutation(len(cues[0]))[:CUES]:
            lie = bool(rng.random() < false)
            kind = (of[number] + rng.integers(1, len(_KINDS))) % len(_KINDS) if lie else of[number]
            passages.append(cues[kind][cue].format(word))
            about.append(number)
            lies.append(lie)
    others = [form.format(day=day, hour=hour) for form in _OTHERS for day in _DAYS for hour in _HOURS]
    for row in rng.permutation(len(others))[:120]:
        passages.append(others[row])
        about.append(-1)
        lies.append(False)
    return Kinds(Examples(texts, of, tuple(_KINDS)), tuple(passages), np.array(about), np.array(lies))


def _invented(count: int, rng: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(_SYLLABLES[place] for place in rng.integers(len(_SYLLABLES), size=3))] = None
    return list(found)
