"""A pool: the files behind a user's sources, cut into shards that can be curated, and redone, one at a time.

A shard is one file, or the row groups of a large parquet file up to about a million rows.  Its stamp changes when the
file does.  Knows nothing of methods.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.core.files import sha256_of
from palimpsest.curate import tables
from palimpsest.data import formats

if TYPE_CHECKING:
    from daft import DataFrame

SHARD_ROWS = 1_000_000  # rows of a parquet file from which it is cut into several shards
_EDGE = 1 << 16  # bytes at either end of a local file that its stamp covers

Source = str | Path


@dataclass(frozen=True)
class Shard:
    """A part of a pool that is read, judged and written in one go."""

    source: str  # absolute path, or URL
    row_groups: tuple[int, ...]  # of a parquet file; () where the shard is the whole file
    stamp: str  # changes when the file does

    @property
    def name(self) -> str:
        """A file name: the source's own, and a hash of where it lies so that two of one name do not meet."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.source).name.split(".")[0])[:60] or "shard"
        part = f"-{self.row_groups[0]}" if self.row_groups else ""
        return f"{stem}-{sha256_of(self.source)[:8]}{part}"

    def frame(self) -> DataFrame:
        """The shard's rows as a lazy Daft frame."""
        daft = require_daft()
        if formats.extension(Path(self.source)) != ".parquet":
            return tables.frame(self.source)
        if not self.row_groups:
            return daft.read_parquet(self.source)
        return daft.read_parquet([self.source], row_groups=[list(self.row_groups)])

    def check(self) -> None:
        """Read the whole shard without Daft; an `InputError` that says what is broken."""
        if formats.extension(Path(self.source)) == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                with _parquet(self.source) as file:
                    for _ in file.iter_batches(row_groups=list(self.row_groups) or None):
                        pass
            except (pyarrow.ArrowException, OSError) as error:
                raise InputError(
                    f"{self.source}: not a readable parquet file ({str(error).splitlines()[0]})"
                ) from error
        else:
            for _ in tables.read(self.source)[1]():
                pass


def require_daft() -> Any:
    """The daft module, with its usage statistics switched off."""
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # ours counts shards
    try:
        import daft
    except ModuleNotFoundError:
        raise MissingExtra("daft", "curate") from None
    return daft


def shards(where: Source | Sequence[Source], *, rows: int = SHARD_ROWS) -> list[Shard]:
    """The shards of files, folders, globs and URLs, in order of name, each once.  Raises `InputError`."""
    wanted = [where] if isinstance(where, str | Path) else list(where)
    if not wanted:
        raise InputError("no source was given; wanted at least one file, folder or glob")
    found: dict[str, Shard] = {}
    for source in wanted:
        for path, stamp in _remote(str(source)) if "://" in str(source) else _local(source):
            for groups in _row_groups(path, rows):
                shard = Shard(path, groups, stamp)
                found.setdefault(shard.name, shard)
    return [found[name] for name in sorted(found)]


def read(where: Source | Sequence[Source]) -> DataFrame:
    """The whole pool as one lazy Daft frame, for use without the engine; a column that some shards lack is null
    there.
    """
    frames = [shard.frame() for shard in shards(where)]
    pool = frames[0]
    for frame in frames[1:]:
        pool = pool.union_all_by_name(frame)
    return pool


def _local(source: Source) -> list[tuple[str, str]]:
    if str(source).startswith("hf:"):
        raise InputError(f"{source}: a pool is read from files; wanted hf://datasets/... for files on the hub")
    return [(str(path.resolve()), file_stamp(path)) for path in formats.find(source)]


def file_stamp(path: Path) -> str:
    """A hash of a local file's size, time of change, first and last 64 KiB: constant time however large it is."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as handle:
        digest.update(handle.read(_EDGE))
        handle.seek(max(0, status.st_size - _EDGE))
        digest.update(handle.read(_EDGE))
    return digest.hexdigest()


def _remote(url: str) -> list[tuple[str, str]]:
    """(URL, stamp of size and time) of the files of a known kind that a URL names: a file, a folder or a glob."""
    import pyarrow
    from pyarrow import fs

    scheme = url.split("://")[0]
    fixed = re.split(r"[*?\[]", url, maxsplit=1)[0]
    magic = fixed != url
    try:
        system, base = _filesystem(fixed.rsplit("/", 1)[0] if magic else url)
        top = system.get_file_info(base)
        inside = [top] if top.type == fs.FileType.File else system.get_file_info(fs.FileSelector(base, recursive=True))
    except (pyarrow.ArrowException, OSError, ValueError, ImportError) as error:
        raise InputError(f"{url}: cannot be listed ({str(error).splitlines()[0]})") from error
    pattern = base + url[len(fixed.rsplit("/", 1)[0]) :] if magic else "*"
    files = [
        info
        for info in inside
        if info.type == fs.FileType.File and formats.extension(Path(info.path)) and fnmatch.fnmatch(info.path, pattern)
    ]
    if not files:
        raise InputError(f"{url}: no file that ends in {', '.join(sorted(formats.EXTENSIONS))}")
    root = "file://" if scheme == "file" else f"{scheme}://"
    return sorted((root + info.path, sha256_of([info.size, info.mtime_ns])) for info in files)


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system that knows a URL and the path in it: Arrow's own, or fsspec's where Arrow has none
    (``hf://``).
    """
    import pyarrow
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(url)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        import fsspec

        system, inner = fsspec.core.url_to_fs(url)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), inner


def _parquet(path: str) -> Any:
    import pyarrow.parquet

    if "://" not in path:
        return pyarrow.parquet.ParquetFile(path)
    system, inner = _filesystem(path)
    return pyarrow.parquet.ParquetFile(system.open_input_file(inner))


def _row_groups(path: str, rows: int) -> list[tuple[int, ...]]:
    """The row groups of each shard of a file; [()] where it stays whole (or cannot be read: the shard itself will
    say why).
    """
    if formats.extension(Path(path)) != ".parquet":
        return [()]
    import pyarrow

    try:
        with _parquet(path) as file:
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return [()]
    if sum(sizes) <= rows:
        return [()]
    parts: list[list[int]] = [[]]
    held = 0
    for number, size in enumerate(sizes):
        if parts[-1] and held + size > rows:
            parts.append([])
            held = 0
        parts[-1].append(number)
        held += size
    return [tuple(part) for part in parts]
