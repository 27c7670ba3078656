"""The command line.  Each command is a dataclass (tyro makes its flags); each method's flags are its hyper-parameters.

Nothing heavy is imported before a command is known, so that ``palimpsest --help`` answers at once.
Exit codes: 0 done, 1 a claim or a verification failed, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import palimpsest
from palimpsest.core.errors import InputError, TrainingDiverged, unknown

PROGRAM = "palimpsest"
Arguments = list[str]

COMMANDS: dict[str, str] = {
    "run": "teach a model, make it forget, audit it and write the proof: with no argument, on an embedded world",
    "forget": "one unlearning method on your model and your records",
    "audit": "measure what a model still knows, against a reference",
    "curate": "choose or weigh the data worth learning from",
    "learn": "meta-train a learner on your labelled data and test it on classes it has not seen",
    "compare": "several methods on your own data, one table, same budget",
    "reproduce": "re-run the claims of papers, with seeds, intervals and a negative control",
    "papers": "the catalogue of papers, searched by meaning",
    "verify": "re-check a certificate: signature, hashes and, on demand, the numbers",
    "ui": "the web page on this machine: papers, lifecycle, before and after, evidence",
    "site": "the catalogue and all claims as plain HTML files",
    "digest": "what changed since a day: new results, changed verdicts, new papers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.  Without `arguments` those of the process, which is then ours to tune."""
    if arguments is None:
        from palimpsest.core.allocator import keep_freed_memory

        keep_freed_memory()
        _speak_plainly()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    try:
        return _dispatch(arguments)
    except (InputError, TrainingDiverged) as error:
        return _fail(str(error))
    except KeyboardInterrupt as interrupt:
        _say(f"interrupted: {interrupt or 'run the same command again to go on'}")
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{os.strerror(error.errno)}")
        raise


def _dispatch(arguments: Arguments) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {palimpsest.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    return _handlers()[command](rest)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            "Teach a model, make it forget, and prove both.",
            "",
            *lines,
            "",
            f"'{PROGRAM} COMMAND --help' shows a command's options, '{PROGRAM} forget METHOD --help' a method's.",
        ]
    )


def _handlers() -> dict[str, Callable[[Arguments], int]]:
    return {
        "run": _run,
        "forget": lambda rest: _method("forget", rest),
        "audit": lambda rest: _method("audit", rest),
        "curate": lambda rest: _method("curate", rest),
        "learn": _learn,
        "compare": _compare,
        "reproduce": _reproduce,
        "papers": _papers,
        "verify": _verify,
        "ui": _ui,
        "site": _site,
        "digest": _digest,
    }


def _run(rest: Arguments) -> int:
    from palimpsest.jobs import run

    return run.run(_parse(run.Run, rest, f"{PROGRAM} run"))


def _compare(rest: Arguments) -> int:
    from palimpsest.jobs import compare

    verb, rest = _positional(rest, "VERB", compare.VERBS, f"{PROGRAM} compare")
    job, options = compare.VERBS[verb]
    return job(_parse(options, rest, f"{PROGRAM} compare {verb}"))


def _reproduce(rest: Arguments) -> int:
    from palimpsest.jobs import reproduce

    slugs, rest = _leading(rest)
    return reproduce.reproduce(slugs, _parse(reproduce.Reproduce, rest, f"{PROGRAM} reproduce [SLUG ...]"))


def _papers(rest: Arguments) -> int:
    from palimpsest.jobs import papers

    words, rest = _leading(rest)
    return papers.papers(" ".join(words), _parse(papers.Papers, rest, f"{PROGRAM} papers [QUERY]"))


def _verify(rest: Arguments) -> int:
    from palimpsest.jobs import verify

    folders, rest = _leading(rest)
    options = _parse(verify.Verify, rest, f"{PROGRAM} verify FOLDER")
    if len(folders) != 1:
        raise InputError(f"wanted one folder with a certificate, got {len(folders)}: {PROGRAM} verify FOLDER")
    return verify.verify(folders[0], options)


def _ui(rest: Arguments) -> int:
    from palimpsest.app import server

    return server.serve(_parse(server.Ui, rest, f"{PROGRAM} ui"))


def _site(rest: Arguments) -> int:
    from palimpsest.jobs import pages

    return pages.site(_parse(pages.Site, rest, f"{PROGRAM} site"))


def _digest(rest: Arguments) -> int:
    from palimpsest.jobs import pages

    return pages.digest(_parse(pages.Digest, rest, f"{PROGRAM} digest"))


def _method(verb: str, rest: Arguments) -> int:
    """``palimpsest VERB METHOD [flags]``."""
    from palimpsest.core import methods
    from palimpsest.jobs import single

    known = {info.name: info for info in methods.all_methods(verb)}
    name, rest = _positional(rest, "METHOD", _summaries(known), f"{PROGRAM} {verb}")
    return _work(known[name], *single.job_of(known[name]), rest, f"{PROGRAM} {verb} {name}")


def _learn(rest: Arguments) -> int:
    """``palimpsest learn FAMILY METHOD [flags]``: a family's learners share their kind of task."""
    from palimpsest.core import methods
    from palimpsest.jobs import learn

    family, rest = _positional(
        rest, "FAMILY", {name: one.summary for name, one in learn.FAMILIES.items()}, f"{PROGRAM} learn"
    )
    every = methods.all_methods("learn")
    known = {info.name: info for info in every if getattr(info.cls, "family", "") == family}
    program = f"{PROGRAM} learn {family}"
    name, rest = _positional(rest, "METHOD", _summaries(known), program)
    job, options = learn.FAMILIES[family].job, learn.FAMILIES[family].options
    if isinstance(options, dict):
        learner: Any = known[name].cls
        options = options[learner.inputs[0]]
    return _work(known[name], job, options, rest, f"{program} {name}")


def _work(info: Any, job: Callable[[Any, Any, Any], int], options: type, rest: Arguments, program: str) -> int:
    """The job's own flags and the method's hyper-parameters side by side."""
    together = dataclasses.make_dataclass(
        "Together", [("data", _flat(options)), ("method", _flat(info.cls))], namespace={"__doc__": info.summary}
    )
    parsed = _parse(together, rest, program)
    return job(info, parsed.method, parsed.data)


def _summaries(known: dict[str, Any]) -> dict[str, str]:
    return {name: info.summary for name, info in known.items()}


def _flat(cls: type) -> Any:
    import tyro

    without_prefix: Any = tyro.conf.OmitArgPrefixes  # an annotation that is made at run time
    return without_prefix[cls]


def _positional(rest: Arguments, kind: str, known: dict[str, Any], program: str) -> tuple[str, Arguments]:
    """The leading word of the arguments; without one, the list of what there is."""
    if not rest or rest[0] in ("-h", "--help"):
        width = max(map(len, known), default=0)
        lines = [f"  {name:<{width}}  {text if isinstance(text, str) else ''}".rstrip() for name, text in known.items()]
        print("\n".join([f"usage: {program} {kind} [options]", "", *lines]))
        raise SystemExit(0 if rest else 2)
    if rest[0].startswith("-"):
        raise InputError(f"wanted {kind} first, got '{rest[0]}': {program} {kind} [options]")
    if rest[0].replace("_", "-").lower() not in known:
        raise unknown(f"{kind.lower()}", rest[0], known)
    return rest[0].replace("_", "-").lower(), rest[1:]


def _leading(rest: Arguments) -> tuple[Arguments, Arguments]:
    """The words before the first flag, and the rest."""
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:first], rest[first:]


def _parse(cls: type, rest: Arguments, program: str) -> Any:
    """The dataclass filled from flags; what is wrong with them becomes one line."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide(unless={"-h", "--help"} & set(rest)):
            return tyro.cli(cls, args=rest, prog=program)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"\x1b\[[0-9;]*m|[^\x20-\x7e]+", " ", complaint.getvalue())  # colours and boxes
        said = re.split(r"Argument helptext|For full helptext", words)[0]
        said = " ".join(re.sub(r"-{3,}", "; ", said).split())
        raise InputError(f"{said} (see {program} --help)") from None


@contextlib.contextmanager
def _wide(unless: object) -> Iterator[None]:
    """A terminal without end, so that no word of a complaint is cut off."""
    before = os.environ.get("COLUMNS")
    if not unless:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _speak_plainly() -> None:
    """Warnings and what our modules log as one line each, without the place in the code that they come from."""
    import logging
    import warnings

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"note: {' '.join(str(message).split())}")

    warnings.showwarning = show
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: note: %(message)s"))
    ours = logging.getLogger("palimpsest")
    ours.handlers, ours.propagate = [handler], False


def _say(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr)


def _fail(message: str) -> int:
    _say("error: " + " ".join(message.split()))
    return 2


if __name__ == "__main__":
    sys.exit(main())
