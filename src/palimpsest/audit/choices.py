"""Multiple-choice items: read from the files that benchmarks come in, written as prompts, answered by a model.

==========================================  =====================================================================
columns of a row                            right answer
==========================================  =====================================================================
``question``/``prompt``, ``choices``/       ``answer``/``completion``/``label``/``target``: the option's place
``options`` (a list)                        counted from 0, its letter, or its text
the same with columns ``A`` to ``H``        the same (MMLU's own headerless csv files are read too)
``best_answer``, ``incorrect`` (a list)     the best answer (TruthfulQA)
==========================================  =====================================================================

``lm-eval:TASK`` takes the items of a task of the lm-evaluation-harness, prompts rendered by the task itself.  An
optional column ``subject``/``category``/``group``/``attribute`` names the group.  Shapes: N items.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from palimpsest.audit.answers import multiple_choice
from palimpsest.core.errors import InputError, MissingExtra, unknown
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import formats, sources

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

Answering = Literal["likelihood", "letter"]
LETTERS = "ABCDEFGH"
LETTER_TOKENS = 10  # that a model may write until it names a letter

_QUESTIONS = ("question", "prompt", "query", "goal", "ctx", "sentence", "problem")
_OPTIONS = ("choices", "options")
_ANSWERS = ("answer", "completion", "label", "target", "gold")
_GROUPS = ("subject", "category", "group", "attribute")
_HARNESS = "lm-eval:"
_INSTRUCTION = "Choose the best option. Answer with the letter only.\n\n"


@dataclass(frozen=True)
class Item:
    """A question with its options, the right one among them."""

    question: str
    options: tuple[str, ...]
    right: int
    group: str = ""
    number: int = 0  # from 1, in its file
    render: Callable[[str], str] | None = field(default=None, repr=False, compare=False)
    """the prompt of a reworded question; None: ``Question: ... Answer:``"""

    def prompt(self, question: str) -> str:
        return self.render(question) if self.render else f"Question: {question}\nAnswer:"

    def lettered(self, question: str) -> str:
        """The prompt that wants a letter (paper, section 4): the options are listed, in their order."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{_INSTRUCTION}Question: {question}\n{listed}\nAnswer:"


def read_items(source: sources.Source) -> list[Item]:
    """The items of a file, folder, glob, ``hf:`` or ``lm-eval:`` source, or of a table.

    Raises `InputError` naming the row for one that is no multiple-choice item.
    """
    if isinstance(source, str) and source.startswith(_HARNESS):
        items = _from_harness(source.removeprefix(_HARNESS))
    else:
        places = _places(source)
        items = [_item(row, where, number) for number, (where, row) in enumerate(places, 1)]
    if not items:
        raise InputError(f"{source}: no rows; wanted at least one multiple-choice item")
    return items


def distinct(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The items without later copies of the same one (a paired test takes items for independent), and the copies' rows.

    Raises `InputError` naming the rows where copies have different right answers.
    """
    first: dict[tuple[str, tuple[str, ...]], Item] = {}
    copies: list[int] = []
    torn: list[str] = []
    for item in items:
        key = (" ".join(item.question.split()), tuple(sorted(item.options)))
        known = first.setdefault(key, item)
        if known is not item:
            copies.append(item.number)
            if known.options[known.right] != item.options[item.right]:
                torn.append(f"row {known.number} and row {item.number}")
    if torn:
        raise InputError(f"the same item with different right answers: {'; '.join(torn[:10])}")
    return list(first.values()), copies


def sample(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """At most `most` items (0: all), drawn by `seed`, in their order."""
    if not 0 < most < len(items):
        return list(items)
    rows = np.sort(numpy_rng(seed, "items").choice(len(items), most, replace=False))
    return [items[row] for row in rows]


def items_sha256(items: Iterable[Item]) -> str:
    return sha256_of([[item.question, list(item.options), item.right] for item in items])


def chance(items: Sequence[Item]) -> float:
    """The share that guessing answers."""
    return float(np.mean([1 / len(item.options) for item in items]))


def answered(
    lm: LM, items: Sequence[Item], questions: Sequence[str], how: Answering, by: Literal["sum", "mean"] = "mean"
) -> np.ndarray:
    """(N,) 1 where the model picks the right option when `questions` are asked in place of the items' own, else 0.

    "likelihood": the likeliest option after the prompt; t options equally likely share the 1.  "letter": the letter
    that the model writes after a prompt that lists the options; no letter is wrong.
    """
    if len(items) != len(questions):
        raise InputError(f"{len(questions)} questions for {len(items)} items: each item needs one")
    if how == "letter":
        prompts = [item.lettered(question) for item, question in zip(items, questions, strict=True)]
        said = lm.generate(prompts, max_new_tokens=LETTER_TOKENS)
        letters = [letter_of(text, len(item.options)) for text, item in zip(said, items, strict=True)]
        return np.array([float(letter == item.right) for letter, item in zip(letters, items, strict=True)])
    found = np.empty(len(items))
    widths = np.array([len(item.options) for item in items])
    for width in np.unique(widths):
        rows = np.flatnonzero(widths == width).tolist()
        prompts = [items[row].prompt(questions[row]) for row in rows]
        options = [[_spaced(option) for option in items[row].options] for row in rows]
        found[rows] = multiple_choice(lm, prompts, options, [items[row].right for row in rows], by)
    return found


def letter_of(text: str, options: int) -> int | None:
    """The place of the option whose letter an answer names: the one after "Answer:", else the last that stands alone.

    `text` must be the model's own words, without the prompt, whose options would be found too.
    """
    letters = LETTERS[:options]
    named = re.search(rf"[Aa]nswer:?\s*\(?([{letters}])\b", text)
    alone = re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", text)
    return LETTERS.index(named[1] if named else alone[-1]) if named or alone else None


def _spaced(option: str) -> str:
    return option if option[:1].isspace() else f" {option}"


def _places(source: sources.Source) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not isinstance(source, str | Path):
        return ((f"the table, row {number}", row) for number, row in enumerate(source, 1))
    if str(source).startswith("hf:"):
        table = sources.from_hub(str(source))
        return ((f"{source}, row {number}", row) for number, row in enumerate(table, 1))
    return (place for path in sources.find(source) for place in _headed(formats.rows(path)))


def _headed(places: Iterable[formats.Place]) -> Iterable[formats.Place]:
    """Rows with named columns.  MMLU's own csv files have no header: their first item was read as one."""
    names = ("question", *LETTERS[:4], "answer")
    headless = None
    for where, row in places:
        if headless is None:
            headless = len(row) == len(names) and str(list(row)[-1]) in LETTERS[:4] and "question" not in row
            if headless:
                yield f"{where}, the header", dict(zip(names, row, strict=True))
        yield where, dict(zip(names, row.values(), strict=True)) if headless else row


def _item(row: Mapping[str, Any], where: str, number: int) -> Item:
    folded = {str(name).strip().lower(): value for name, value in row.items()}
    question = _first(folded, _QUESTIONS)
    group = _first(folded, _GROUPS)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: found the columns {_named(row)}; wanted a 'question' that is text")
    if folded.get("best_answer") is not None and folded.get("incorrect") is not None:
        best = str(folded["best_answer"]).strip()
        given = [best, *(str(option).strip() for option in folded["incorrect"] if str(option).strip() != best)]
        # the right one must not always be the first
        order = numpy_rng(0, "options", question).permutation(len(given)).tolist()
        return _built(question, [given[place] for place in order], order.index(0), group, number)
    options: Any = _first(folded, _OPTIONS)
    if isinstance(options, Mapping):  # ARC's form: {"text": [...], "label": [...]}
        options = options.get("text")
    if options is None:
        options = [folded[letter.lower()] for letter in LETTERS if folded.get(letter.lower()) is not None]
    if not isinstance(options, list | tuple) or len(options) < 2:
        raise InputError(
            f"{where}: found the columns {_named(row)}; wanted 'choices' (a list of at least two), columns A, B, C, D, "
            "or 'best_answer' and 'incorrect'"
        )
    texts = [str(option).strip() for option in options]
    return _built(question, texts, _right(_first(folded, _ANSWERS), texts, where), group, number)


def _built(question: str, options: list[str], right: int, group: Any, number: int) -> Item:
    return Item(question.strip(), tuple(options), right, "" if group is None else str(group), number)


def _right(answer: Any, options: list[str], where: str) -> int:
    text = str(answer).strip()
    if isinstance(answer, str) and text in options:
        return options.index(text)
    if isinstance(answer, str) and len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        return LETTERS.index(text.upper())
    if (isinstance(answer, int) or text.isdigit()) and 0 <= int(text) < len(options):
        return int(text)
    raise InputError(
        f"{where}: the answer is {answer!r:.60}; wanted the place of one of the {len(options)} options (from 0), its "
        "letter or its text"
    )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _named(row: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'"[:40] for name in list(row)[:12]) or "none"


def _from_harness(name: str) -> list[Item]:
    """The items of a multiple-choice task; its own template writes the prompt, also around a reworded question."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra("lm_eval", "harness") from None
    own = name.endswith((".yaml", ".yml"))  # a task of the user's: the thousands that ship need not be indexed
    manager = TaskManager(include_path=str(Path(name).parent) if own else None, include_defaults=not own)
    task_name = Path(name).stem if own else name
    if task_name not in manager.all_tasks:
        raise unknown("lm-eval task", task_name, manager.all_tasks)
    items: list[Item] = []
    for label, task in manager.load(task_name)["tasks"].items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise InputError(f"{_HARNESS}{label} is a task of the kind {task.OUTPUT_TYPE}; wanted multiple_choice")
        for doc in task.test_docs() if task.has_test_docs() else task.validation_docs():
            items.append(_harness_item(task, dict(doc), str(label), len(items) + 1))
    return items


def _harness_item(task: Any, doc: dict[str, Any], label: str, number: int) -> Item:
    written = task.doc_to_text(doc)
    column = next((name for name in _QUESTIONS if isinstance(doc.get(name), str) and doc[name] in str(written)), None)
    where = f"{_HARNESS}{label}, item {number}"
    if column is None or not isinstance(written, str):
        raise InputError(f"{where}: found the columns {_named(doc)}; none of them is the question in the task's prompt")
    options = [str(option) for option in task.doc_to_choice(doc)]
    right = _right(task.doc_to_target(doc), options, where)
    return Item(
        doc[column], tuple(options), right, label, number, lambda question: task.doc_to_text({**doc, column: question})
    )
