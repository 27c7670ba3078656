"""Readers of one file each: rows as they stand in the file, one at a time, with the place of each for error messages.

Our own readers rather than those of `datasets`, which lose line numbers and turn broken input into their own errors.
Knows nothing of column names.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from palimpsest.core.errors import InputError

Place = tuple[str, Any]  # ("file:line" or "file, row n", the row)
PASSAGE = 800  # characters of a passage of a .txt, about 200 tokens


def rows(path: Path) -> Iterator[Place]:
    """Every row of a file of one of the `EXTENSIONS`, with its place."""
    return READERS[extension(path)](path)


def extension(path: Path) -> str:
    """The known extension of `path`, with ``.gz`` where it ends so; "" if it has none of them."""
    name = path.name.lower()
    return next((known for known in EXTENSIONS if name.endswith(known)), "")


def find(source: str | Path) -> list[Path]:
    """The files that a path, folder or glob names, all with known extensions.  Raises `InputError`."""
    path = Path(source).expanduser()
    known = ", ".join(sorted(EXTENSIONS))
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        inside = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        files = [file for file in inside if extension(file)]
        if not files:
            names = ", ".join(file.name for file in inside[:5]) or "nothing"
            raise InputError(f"{path}: the folder holds {names}; wanted a file that ends in {known}")
        return files
    if not path.exists() and glob.has_magic(str(path)):
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise InputError(f"{path}: no file matches")
        return [_known(file, known) for file in files]
    if not path.exists():
        raise InputError(_missing(path))
    return [_known(path, known)]


def _known(path: Path, known: str) -> Path:
    if not extension(path):
        raise InputError(f"{path}: unknown kind of file '{path.suffix or path.name}'; wanted one that ends in {known}")
    return path


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder}"
    names = sorted(file.name for file in folder.iterdir() if extension(file) or file.is_dir())
    stems = {name.lower(): name for name in names}
    near = [stems[name] for name in difflib.get_close_matches(path.name.lower(), stems, n=3, cutoff=0.6)]
    near += [name for name in names if name.split(".")[0] == path.name.split(".")[0] and name not in near]
    return f"{path}: no such file" + (f"; did you mean {' or '.join(near[:3])}?" if near else "")


def json_lines(path: Path) -> Iterator[Place]:
    """One JSON object a line; empty lines are skipped."""
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def json_file(path: Path) -> Iterator[Place]:
    """A list of objects, or an object with such a list under ``data``.  Large data belongs in ``.jsonl``."""
    text = "".join(line for _, line in _lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line? then name it .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}){hint}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise InputError(f"{path}: found {_kind(value)}; wanted a list of objects (or an object with one as 'data')")
    for number, row in enumerate(value, 1):
        yield f"{path}, row {number}", _object(row, f"{path}, row {number}")


def csv_file(path: Path) -> Iterator[Place]:
    """A header line, then one record each (quoted cells may hold line ends); empty cells are None.

    The separator is the one of ``, ; TAB`` that the header holds most of.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses cells of more than 131072 characters: documents are longer
    numbered = _lines(path)
    first = next(((number, line) for number, line in numbered if line.strip()), None)
    if first is None:
        return
    before, head = first
    separator = max(",;\t", key=head.count)

    def lines() -> Iterator[str]:
        yield head
        for _, line in numbered:
            yield line

    reader = csv.reader(lines(), delimiter=separator, strict=True)
    start = before
    try:
        header = next(reader)
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise InputError(f"{path}:{before}: the column '{doubled[0]}' appears twice; wanted different names")
        while True:
            start = before + reader.line_num  # a record may span lines: an error is shown at the first of them
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                wanted = f"{len(header)} as in the header ({', '.join(header)})"
                raise InputError(f"{path}:{start}: found {len(cells)} cells; wanted {wanted}")
            yield f"{path}:{start}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{path}:{start}: not valid CSV ({error})") from error


def parquet_file(path: Path) -> Iterator[Place]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def text_file(path: Path) -> Iterator[Place]:
    """Passages of running text: whole paragraphs (parted by empty lines) packed to at most about `PASSAGE` characters.

    A longer paragraph is split at sentence ends, a longer sentence at spaces.  Inside a passage the text is as in the
    file, line ends included; paragraphs are parted by one empty line.
    """
    held: list[str] = []
    start = size = 0
    for number, paragraph in _paragraphs(path):
        for piece in split(paragraph, PASSAGE):
            if held and size + len(piece) > PASSAGE:
                yield f"{path}:{start}", {"text": "\n\n".join(held)}
                held, size = [], 0
            if not held:
                start = number
            held.append(piece)
            size += len(piece) + 2
    if held:
        yield f"{path}:{start}", {"text": "\n\n".join(held)}


def split(text: str, limit: int) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, cut after sentences, else at spaces, else anywhere."""
    text = text.strip()
    while len(text) > limit:
        window = text[: limit + 1]
        ends = [match.end(1) for match in re.finditer(r"([.!?][\"'”’)\]]*)\s", window)]
        spaces = [match.start() for match in re.finditer(r"\s", window)]
        cut = (ends or spaces or [limit])[-1]
        yield text[:cut].rstrip()
        text = text[cut:].lstrip()
    if text:
        yield text


READERS: dict[str, Callable[[Path], Iterator[Place]]] = {
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".csv.gz": csv_file,
    ".parquet": parquet_file,
    ".txt": text_file,
    ".txt.gz": text_file,
}
EXTENSIONS = tuple(sorted(READERS, key=len, reverse=True))


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    held: list[str] = []
    start = 0
    for number, line in _lines(path):
        if line.strip():
            if not held:
                start = number
            held.append(line.rstrip())
        elif held:
            yield start, "\n".join(held)
            held = []
    if held:
        yield start, "\n".join(held)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file, plain or gzip; a byte order mark is dropped."""
    offset = 0
    try:
        with open_binary(path) as handle:
            for number, raw in enumerate(handle, 1):
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise InputError(f"{path}: found UTF-16 text; wanted UTF-8 (save it again as UTF-8)")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {offset + error.start}); "
                        "wanted UTF-8 text"
                    ) from error
                offset += len(raw)
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def open_binary(path: Path) -> BinaryIO:
    """A file, unpacked if its name ends in ``.gz``."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{where}: found {_kind(value)}; wanted an object such as {{"text": "..."}}')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
