"""Biomed-Enriched: a large model labels a sample, a small encoder learns its labels and gives them to all the rest.

Touchent et al. 2025 (arXiv:2506.20331).  Needs a pool of texts (paragraphs, with the column that says which article
they are from, if they are) and somebody who labels: a large model, or a file of labelled texts.  What is labelled is
up to the schema; the paper's three fields (type, domain, educational value) are the default.  Rows are filtered and
their articles repeated by a recipe (see `palimpsest.curate.recipes`).  The labels are a model's opinion: nobody who
knows the field has checked them, and of a class that the sample lacks nothing is learnt.

Ours: the paper's prompt is not published; a student's values shrink towards the mean, so a line on a scale is moved to
where, on held-out texts, the student's values pass as often as the labels do; an article is judged by its rows in a
shard.  Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from palimpsest.core import cache
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.methods import config_of, method
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.curate import agreement, labels
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.labels import Labelled, Schema
from palimpsest.curate.pool import require_daft
from palimpsest.curate.recipes import Recipe

if TYPE_CHECKING:
    from daft import DataFrame

    from palimpsest.curate.student import Student

Array = np.ndarray[Any, Any]

_FEWEST = 20  # labelled texts to learn from
_ORDER = ("draw", "text", "context", "article")  # of the texts that a teacher may be asked about
_ASIDE = 12  # unusable answers that the report shows
_TOLD, _LABELLED = "told.json", "labelled.jsonl"  # in the facts, beside the student's files


@method(verb="curate", paper="biomed_enriched", name="biomed-enriched")
@dataclass(frozen=True)
class BiomedEnriched:
    """Label a sample by a large model and the rest by an encoder that learnt from it; filter and repeat by the labels.

    Adds ``label_*`` and ``probability_*`` of each class field, ``score_*`` of each scale, ``truncated``, ``keep``,
    ``weight`` (how often the row counts, 0 where it is left out) and ``reason``.
    """

    schema: str = ""  # file: {"role", "fields": {NAME: {"classes" | "scale": {LABEL: MEANING}}}}; "": the paper's
    teacher: str = ""  # who labels: name of a model behind an OpenAI-compatible endpoint, or folder of one
    base_url: str = ""  # of the endpoint; "": OpenAI's own (the key is read from OPENAI_API_KEY)
    annotations: str = ""  # in place of a teacher: file of labelled texts, one column a field
    student: str = ""  # in place of both: facts.parquet of an earlier run, whose student labels this pool
    sample: int = 2_000  # texts that the teacher labels, drawn by hash
    text: str = "text"  # column
    context: str = ""  # column of what stands above the text, such as the title of its section
    article: str = ""  # column that says which article a row is from; "": each row is one
    keep: str = "educational >= 3"  # conditions, separated by ;
    upsample: str = "most domain = clinical: 10; any type = clinical case: 10"  # repeats, separated by ;
    encoder: str = ""  # to become the student: folder or hub name; "": the packaged one
    held_out: float = 0.1  # of the labelled texts, by article, to see how well the student does
    epochs: int = 3
    lr: float = 1e-4  # the paper's sister model: 2e-5, for an encoder twelve times as large
    batch: int = 8
    length: int = 512  # tokens of a text that the student reads
    pooling: str = "first"  # what stands for a text: the output for its first token, or the "mean" over all
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, not {self.held_out}")
        if self.sample < _FEWEST:
            raise InputError(f"sample must be at least {_FEWEST}, not {self.sample}")

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def survey(self, shard: DataFrame) -> DataFrame:
        """The shard's texts with the lowest hashes, for the teacher; none where others have labelled."""
        daft = require_daft()
        self._check()
        text = text_column(shard, self.text)
        draw = daft.functions.hash(text, seed=derive(self.seed, "sample"), hash_function="xxhash3_64")
        found = shard.where(text.not_null() & (text.lstrip() != "")).select(
            text.alias("text"),
            self._column(shard, self.context).alias("context"),
            self._column(shard, self.article).alias("article"),
            draw.alias("draw"),
        )
        once = found.groupby("text").agg(*(daft.col(name).min() for name in ("context", "article", "draw")))
        order: list[Any] = [daft.col(name) for name in _ORDER]
        return once.sort(order).limit(self.sample if self.teacher else 0)

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """One row a file (name, content): the student's, the labelled texts, and what is told of both."""
        from palimpsest.curate import student as students

        if self.student:
            return _earlier(self.student)
        schema = self._schema()
        Recipe.parse(self.keep, self.upsample, schema)  # before anything costs
        labelled = self._labelled(parts, schema)
        learn, test = self._split(labelled)
        course = students.Course(self.epochs, self.lr, self.batch, self.length, self.pooling, self.seed)
        unfinished = cache.folder("biomed-enriched-unfinished", [sha256_of(labelled.rows), config_of(self)])
        encoder = self.encoder or students.PACKAGED
        student = students.train(learn, schema, encoder, course, checkpoint=unfinished, progress="teaching the student")
        shutil.rmtree(unfinished, ignore_errors=True)
        files = student.pack()
        told = {
            "by": labelled.by,
            "labelled": len(labelled.rows),
            "aside": dict(labelled.reasons().most_common()),
            "examples": labelled.aside[:_ASIDE],
            "held_out": agreement.held_out(student.label(*_read(test)), test, schema),
            "single": [field.name for field in schema.fields if len({row[field.name] for row in learn}) == 1],
            "student": sha256_of({name: hashlib.sha256(content).hexdigest() for name, content in files.items()}),
        }
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled.rows)
        files |= {_TOLD: json.dumps(told).encode(), _LABELLED: lines.encode()}
        return pa.table({"name": list(files), "content": pa.array(files.values(), pa.large_binary())})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        student = student_of(facts)
        recipe = Recipe.parse(self.keep, self.upsample, student.schema)
        row = daft.functions.hash(
            text_column(shard, self.text).fill_null(""),
            self._column(shard, self.context),
            self._column(shard, self.article),
            hash_function="xxhash3_64",
        )
        found = self._verdicts(shard, row, student, recipe, agreement.lines(recipe, told_of(facts)["held_out"]))

        def looked_up(name: str) -> Any:
            @daft.func.batch(return_dtype=daft.DataType.from_arrow_type(found.columns[name].type), use_process=False)
            def look_up(rows: Any) -> Any:
                return found(name, rows.to_arrow().to_numpy())

            return look_up(row)

        return add(shard, {name: looked_up(name) for name in found.columns})

    def review(self, judged: DataFrame) -> DataFrame:
        """Rows by label: in all, kept, and those of which the student could not read the end."""
        daft = require_daft()
        names: list[Any] = [name for name in judged.column_names if name.startswith("label_")]
        count = [daft.col(name).cast(daft.DataType.int64()).sum().alias(name) for name in ("keep", "truncated")]
        if not names:
            return judged.agg(daft.col("keep").count().alias("rows"), *count)
        return judged.groupby(*names).agg(daft.col("keep").count().alias("rows"), *count).sort(names)

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        told, student = told_of(facts), student_of(facts)
        schema = student.schema
        rows = [row for part in reviews for row in part.to_pylist()]
        recipe = Recipe.parse(self.keep, self.upsample, schema)
        aside = sum(told["aside"].values())
        truncated = sum(row["truncated"] or 0 for row in rows)
        warnings = [f"The labels hold a single {name}: nothing was learnt about it." for name in told["single"]]
        if aside:
            reasons = "; ".join(f"{count:,}: {why}" for why, count in told["aside"].items())
            warnings.append(f"{aside:,} answers of {told['by']} could not be used and were kept aside ({reasons}).")
        if truncated:
            warnings.append(f"Of {truncated:,} texts the student read the first {student.length:,} tokens only.")
        found = agreement.agreement(told["held_out"], schema)
        tables = [
            agreement.agreement_table(found),
            agreement.line_table(recipe, told["held_out"]),
            *(agreement.label_table(field.name, rows) for field in schema.fields if not field.scale),
            _aside_table(told["examples"]) if aside else None,
        ]
        numbers = {f"{line['field']}_{name}": line[name] for line in found for name in line if name != "field"}
        return {
            "numbers": {"labelled": told["labelled"], "aside": aside, "truncated": truncated, **numbers},
            "sentences": [
                f"{told['by']} labelled {told['labelled']:,} texts; a student learnt them and labelled the pool.",
                f"With repeats the kept rows count as {totals.get('weight', 0):,.0f}.",
            ],
            "warnings": warnings,
            "curves": [],
            "tables": [table for table in tables if table],
        }

    def _check(self) -> None:
        who = [name for name in ("teacher", "annotations", "student") if getattr(self, name)]
        if len(who) != 1:
            given = " and ".join(who) or "nobody"
            raise InputError(f"wanted one of teacher, annotations and student to say who labels, got {given}")
        if self.student and self.schema:
            raise InputError("the student of an earlier run has its own schema; leave out schema")

    def _schema(self) -> Schema:
        return Schema.load(self.schema) if self.schema else labels.BIOMEDICAL

    def _labelled(self, parts: Sequence[pa.Table], schema: Schema) -> Labelled:
        if self.annotations:
            where = {"text": self.text, "context": self.context, "article": self.article}
            return labels.annotated(self.annotations, schema, **where)
        table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in _ORDER])
        once: dict[str, dict[str, Any]] = {}
        for row in table.select(["text", "context", "article"]).to_pylist():
            once.setdefault(row["text"], row)
        return labels.annotate(self._teacher(), schema, list(once.values())[: self.sample])

    def _teacher(self) -> Any:
        from palimpsest.data.teacher import Teacher

        if Path(self.teacher).is_dir():
            from palimpsest.models.lm import LM

            return Teacher.local(LM.load(self.teacher), Path(self.teacher).name)
        return Teacher.endpoint(self.teacher, base_url=self.base_url)

    def _split(self, labelled: Labelled) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What the student learns from, and what it is tested on: no article is on both sides."""
        groups = [row.get("article") or row["text"] for row in labelled.rows]
        different = sorted(set(groups))
        if len(labelled.rows) < _FEWEST or len(different) < 2:
            raise InputError(
                f"{len(labelled.rows):,} usable labelled texts from {len(different):,} articles "
                f"({sum(labelled.reasons().values()):,} kept aside); wanted at least {_FEWEST} from 2 to learn from"
            )
        count = min(max(1, round(self.held_out * len(different))), len(different) - 1)
        picked = numpy_rng(self.seed, "held out").choice(len(different), count, replace=False)
        test = {different[place] for place in picked}
        sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for row, group in zip(labelled.rows, groups, strict=True):
            sides[group in test].append(row)
        return sides

    def _column(self, frame: DataFrame, name: str) -> Any:
        """A column as text, "" where it is null or not wanted."""
        daft = require_daft()
        if not name:
            return daft.lit("")
        if name not in frame.column_names:
            found = ", ".join(f"'{column}'" for column in frame.column_names)
            raise InputError(f"no column '{name}'; found {found}")
        return daft.col(name).cast(daft.DataType.string()).fill_null("")

    def _verdicts(
        self, shard: DataFrame, row: Any, student: Student, recipe: Recipe, lines: Mapping[str, float]
    ) -> Verdicts:
        """Label every different row once, then judge them together: what becomes of one hangs on its article."""
        wanted = shard.select(
            row.alias("row"),
            text_column(shard, self.text).fill_null("").alias("text"),
            self._column(shard, self.context).alias("context"),
            self._column(shard, self.article).alias("article"),
        )
        seen: dict[int, str] = {}  # row: its article
        empty: list[bool] = []
        found = [student.label([])]
        for batch in wanted.to_arrow_iter():
            fresh = {one["row"]: one for one in batch.to_pylist() if one["row"] not in seen}
            seen |= {number: one["article"] if self.article else str(number) for number, one in fresh.items()}
            empty += [not one["text"].strip() for one in fresh.values()]
            found.append(student.label(*_read(fresh.values())))
        values = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        return _judged(seen, np.array(empty, bool), values, student.schema, recipe, lines)


@dataclass(frozen=True)
class Verdicts:
    """What becomes of each different row."""

    rows: Array  # (N,) uint64 hashes, ascending
    columns: dict[str, pa.Array]  # by added column: (N,) values

    def __call__(self, name: str, rows: Array) -> pa.Array:
        """(B,) values of a column for the rows with these hashes."""
        return self.columns[name].take(pa.array(np.searchsorted(self.rows, rows)))


def _judged(
    seen: Mapping[int, str],
    empty: Array,
    values: Mapping[str, Array],
    schema: Schema,
    recipe: Recipe,
    lines: Mapping[str, float],
) -> Verdicts:
    """`seen`: rows and their articles; of the same rows `empty`: (N,) no text, `values`: as from `Student.label`."""
    rows = np.fromiter(seen, np.uint64, len(seen))
    _, articles = np.unique(np.array(list(seen.values()), str), return_inverse=True)
    said: dict[str, Array] = {}
    columns: dict[str, pa.Array] = {}
    for field in schema.fields:
        found = values[field.name]
        if field.scale:
            said[field.name] = found
            columns[f"score_{field.name}"] = pa.array(found, mask=empty)
            continue
        said[field.name] = np.array(list(field.points), object)[found.argmax(1)]
        columns[f"label_{field.name}"] = pa.array(said[field.name], pa.string(), mask=empty)
        columns[f"probability_{field.name}"] = pa.StructArray.from_arrays(
            [pa.array(column) for column in found.T], names=list(field.points), mask=pa.array(empty)
        )
    keep, weight, why = np.zeros(len(rows), bool), np.zeros(len(rows), np.int64), np.full(len(rows), "no text", object)
    full = ~empty
    keep[full], weight[full], why[full] = recipe(
        {name: value[full] for name, value in said.items()}, articles[full], lines
    )
    columns |= {name: pa.array(value) for name, value in (("keep", keep), ("weight", weight))}
    columns |= {"truncated": pa.array(values["truncated"]), "reason": pa.array(why, pa.string())}
    order = np.argsort(rows)
    return Verdicts(rows[order], {name: column.take(pa.array(order)) for name, column in columns.items()})


def _read(rows: Collection[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Texts and contexts, as a student takes them."""
    return [row["text"] for row in rows], [row.get("context") or "" for row in rows]


def _earlier(path: str) -> pa.Table:
    """The facts of an earlier run."""
    try:
        table = pyarrow.parquet.read_table(path)
        told_of(table)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not the facts.parquet of a biomed-enriched run ({str(error).splitlines()[0]})"
        ) from None
    return table.replace_schema_metadata(None)


def told_of(facts: pa.Table) -> dict[str, Any]:
    """What `BiomedEnriched.gather` tells: who labelled, how many, what was set aside, the held-out labels."""
    found: dict[str, Any] = json.loads(_file(facts, _TOLD))
    return found


def labelled_of(facts: pa.Table) -> list[dict[str, Any]]:
    """The labelled texts."""
    return [json.loads(line) for line in _file(facts, _LABELLED).decode().splitlines()]


def student_of(facts: pa.Table) -> Student:
    """The student, made once a process."""
    from palimpsest.curate.student import Student

    digest = told_of(facts)["student"]
    with _making:
        if digest not in _students:
            files = dict(zip(facts["name"].to_pylist(), facts["content"].to_pylist(), strict=True))
            _students.clear()
            _students[digest] = Student.unpack({name: files[name] for name in files if name not in (_TOLD, _LABELLED)})
        return _students[digest]


_students: dict[str, Student] = {}
_making = threading.Lock()  # Daft asks from several threads at once


def _file(facts: pa.Table, name: str) -> bytes:
    found: bytes = facts["content"][facts["name"].to_pylist().index(name)].as_py()
    return found


def _aside_table(examples: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    names = ["why", "answer", "text"]
    rows = [[example[name] for name in names] for example in examples]
    return {"caption": "Answers kept aside", "columns": names, "rows": rows}
