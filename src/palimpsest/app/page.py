"""The web page: papers, lifecycle, before and after, evidence.  Layout and events; what they do is beside this file."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from palimpsest import catalog
from palimpsest.app import forms, words
from palimpsest.app.asking import Asker, prepared
from palimpsest.app.running import Jobs
from palimpsest.app.standing import RESULTS, VERDICTS, Standing, by_date, by_strength, standings
from palimpsest.core import methods
from palimpsest.core.errors import InputError

RECORDS = [".jsonl", ".gz", ".json", ".csv", ".parquet", ".txt"]
_PLAIN = 10  # fields of the lifecycle's form that every method has
ASKERS = 64  # questions answered in one batch
_ORDERS: dict[str, Callable[[Sequence[Standing]], list[Standing]]] = {
    "newest first": by_date,
    "strongest first": by_strength,
}
_FILES = ("report.html", "evidence.json", "measurements.csv", "certificate.json", "model/README.md", "compare.html")


def build(runs: Path, results: str | None) -> tuple[gr.Blocks, Jobs]:
    """The page over the runs in the folder `runs` and the claims' results, and the runs it may start."""
    jobs, asker = Jobs(runs), Asker()
    with gr.Blocks(title="palimpsest", analytics_enabled=False) as page:
        gr.Markdown("# palimpsest\nTeach a model, make it forget, and prove both.")
        with gr.Tab("Papers"):
            _papers(results)
        with gr.Tab("Lifecycle"):
            _lifecycle(jobs)
        with gr.Tab("Before / after"):
            _answers(jobs, asker)
        with gr.Tab("Evidence"):
            _evidence(jobs)
    page.queue(max_size=256)
    return page, jobs


# papers


def _papers(results: str | None) -> None:
    read: dict[Any, dict[str, Standing]] = {}  # by the state of the results file

    def newest() -> dict[str, Standing]:
        file = Path(results or RESULTS)
        stamp = file.stat().st_mtime_ns if file.exists() else None
        if stamp not in read:
            read.clear()
            read[stamp] = {one.paper.slug: one for one in standings(results)}
        return read[stamp]

    def show(query: str, verb: str, verdict: str, order: str) -> str:
        found = newest()
        if query.strip():
            ranked = [found[paper.slug] for paper, _ in catalog.search(query, k=12)]
        else:
            ranked = _ORDERS[order](list(found.values()))
        return words.cards(
            [one for one in ranked if verb in ("all", one.paper.verb) and verdict in ("all", one.verdict)]
        )

    with gr.Row():
        query = gr.Textbox(label="Search by meaning", placeholder="make a model forget a book", scale=3)
        verb = gr.Dropdown(["all", *methods.VERBS], value="all", label="Verb", scale=1)
        verdict = gr.Dropdown(["all", *VERDICTS], value="all", label="Verdict", scale=1)
        order = gr.Dropdown(list(_ORDERS), value="newest first", label="Order (without a search)", scale=1)
    cards = gr.HTML(show("", "all", "all", "newest first"))
    inputs = [query, verb, verdict, order]
    query.input(show, inputs, cards, trigger_mode="always_last", show_progress="hidden", api_name="papers")
    for filtered in (verb, verdict, order):
        filtered.change(show, inputs, cards, show_progress="hidden", api_visibility="private")


# lifecycle


def _lifecycle(jobs: Jobs) -> None:
    known = {info.name: info for info in methods.all_methods("forget")}
    gr.Markdown(
        "Give records and a model, or neither: then an embedded world of fictional people is learned and forgotten."
    )
    with gr.Row():
        forget = gr.File(label="Records that must go", file_types=RECORDS)
        retain = gr.File(label="Records to stay useful on", file_types=RECORDS)
        holdout = gr.File(label="Records the model never saw", file_types=RECORDS)
    with gr.Row():
        model = gr.Textbox(label="Your model: a folder here, or empty to train a small one", max_length=500)
        chosen = gr.Dropdown(list(known), value=["npo"], multiselect=True, label="Methods (one: with its settings)")
        name = gr.Textbox(label="Name of the run", value="first-run", max_length=64)
    with gr.Row():
        steps = gr.Number(label="Most optimiser steps (0: the method's own)", value=0, precision=0, minimum=0)
        lr = gr.Number(label="Learning rate (0: tuned, or its own)", value=0, minimum=0)
        lora = gr.Number(label="LoRA rank (0: all weights)", value=0, precision=0, minimum=0)
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0)
        attacks = gr.Checkbox(label="Attack the result too: removed, or only suppressed?")
    status = gr.HTML()

    @gr.render(inputs=chosen)
    def form(names: list[str]) -> None:
        info = known[names[0]] if len(names) == 1 else None
        entries = forms.entries(info) if info else []
        fields: list[Any] = []
        if info:
            with gr.Accordion(f"Settings of {info.name}: {info.summary}", open=False), gr.Row():
                fields = [_field(entry) for entry in entries]
        with gr.Row():
            start = gr.Button("Run (goes on where it was cancelled)", variant="primary")
            cancel = gr.Button("Cancel after this step")
            watch = gr.Button("Watch a run in progress")

        def run(*values: Any) -> Iterator[str]:
            *plain, attacked, name = values[:_PLAIN]
            settings = values[_PLAIN:]
            try:
                flags = _flags(names, *plain) + (["--attacks"] if attacked else [])
                given = dict(zip([entry.name for entry in entries], settings, strict=True))
                flags += forms.settings(info, given) if info else []
                jobs.start(name, flags)
            except InputError as error:
                yield words.complaint(str(error))
                return
            yield from follow(name)

        def follow(name: str) -> Iterator[str]:
            job = jobs.get(name)
            if job is None:
                yield words.complaint(f"no run '{name}' was started since this page's server is up")
                return
            while job.running:
                yield words.progress(job)
                time.sleep(0.5)
            time.sleep(0.1)  # its last words
            yield words.progress(job)

        def stop(name: str) -> str:
            job = jobs.get(name)
            if job is None or not job.running:
                return words.complaint(f"no run '{name}' is in progress")
            job.cancel()
            return words.progress(job)

        given = [forget, retain, holdout, model, steps, lr, lora, seed, attacks, name, *fields]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 8}
        start.click(run, given, status, **hidden)
        watch.click(follow, name, status, **hidden)
        cancel.click(stop, name, status, **hidden)


def _field(entry: forms.Entry) -> Any:
    if entry.kind == "bool":
        return gr.Checkbox(value=entry.default, label=entry.name)
    if entry.kind == "choice":
        return gr.Dropdown(list(entry.choices), value=str(entry.default), label=entry.name)
    if entry.kind == "number":
        return gr.Number(value=entry.default, label=entry.name)
    return gr.Textbox(value=entry.default, label=entry.name)


def _flags(
    names: Sequence[str],
    forget: str | None,
    retain: str | None,
    holdout: str | None,
    model: str,
    steps: float | None,
    lr: float | None,
    lora_rank: float | None,
    seed: float | None,
) -> list[str]:
    """The flags of `palimpsest run` for what was filled in."""
    if not names:
        raise InputError("no method is chosen")
    flags = ["--method", ",".join(names), "--seed", str(int(seed or 0))]
    given: dict[str, Any] = {"forget": forget, "retain": retain, "holdout": holdout, "model": model.strip()}
    given |= {"steps": int(steps or 0), "lr": lr, "lora-rank": int(lora_rank or 0)}  # 0 is the method's own
    for flag, value in given.items():
        if value:
            flags += [f"--{flag}", str(value)]
    return flags


# before and after


def _answers(jobs: Jobs, asker: Asker) -> None:
    def questions(run: str | None) -> dict[str, Any]:
        if not run:
            return gr.update(choices=[], value=None)
        found = prepared(jobs.where(run))
        return gr.update(choices=[(f"{one.group}: {one.prompt[:160]}", one.prompt) for one in found], value=None)

    def ask(runs: list[str | None], prompts: list[str | None]) -> list[list[str]]:
        shown = [words.complaint("choose a finished run first")] * len(runs)
        for run in dict.fromkeys(runs):
            places = [place for place, other in enumerate(runs) if other == run and run]
            valid = []
            for place in places:
                try:
                    asker.check(prompts[place] or "")
                    valid.append(place)
                except InputError as error:
                    shown[place] = words.complaint(str(error))
            try:
                answers = asker.ask(_finished(jobs, run), [prompts[place] or "" for place in valid]) if valid else []
                for place, answer in zip(valid, answers, strict=True):
                    shown[place] = words.answers(answer, prompts[place] or "")
            except InputError as error:
                for place in valid:
                    shown[place] = words.complaint(str(error))
        return [shown]

    run = _runs(jobs)
    with gr.Row():
        ready = gr.Dropdown([], label="Questions from the forget and retain sets", scale=2)
        prompt = gr.Textbox(label="Your question", max_length=2000, scale=2, elem_id="question")
    button = gr.Button("Ask all models", variant="primary")
    answer = gr.HTML()
    run.change(questions, run, ready, api_visibility="private")
    # what a user picks, not what choosing a run puts there: that would wipe a question being typed
    ready.input(lambda text: text or "", ready, prompt, api_visibility="private")
    batched: dict[str, Any] = {"batch": True, "max_batch_size": ASKERS}
    button.click(ask, [run, prompt], answer, api_name="ask", **batched)
    prompt.submit(ask, [run, prompt], answer, api_visibility="private", **batched)


# evidence


def _evidence(jobs: Jobs) -> None:
    def show(run: str | None) -> tuple[str, list[str], str]:
        if not run:
            return "", [], ""
        folder = _finished(jobs, run)
        report = (folder / "report.html").read_text(encoding="utf-8")
        files = [str(folder / name) for name in _FILES if (folder / name).is_file()]
        return words.framed(report, f"Report of {run}"), [_copy(path, Path(copies.name), run) for path in files], ""

    def verify(run: str | None, certificate: str | None) -> str:
        if not run or not certificate:
            return words.complaint("choose the run that the certificate is of, and give the certificate")
        try:
            return words.checks(_verified(_finished(jobs, run), Path(certificate)))
        except InputError as error:
            return words.complaint(str(error))

    copies = tempfile.TemporaryDirectory()  # what is offered for download, not the runs' own folders
    run = _runs(jobs)
    with gr.Row():
        certificate = gr.File(label="A certificate to verify against this run", file_types=[".json"])
        files = gr.File(label="Downloads", file_count="multiple", interactive=False)
    checked = gr.HTML()
    report = gr.HTML()
    run.change(show, run, [report, files, checked], api_visibility="private")
    certificate.upload(verify, [run, certificate], checked, api_name="verify")


def _runs(jobs: Jobs) -> gr.Dropdown:
    """A choice of finished runs, read anew whenever it is opened."""
    run = gr.Dropdown(jobs.finished(), value=None, label="Finished run", allow_custom_value=False)
    run.focus(lambda: gr.update(choices=jobs.finished()), None, run, api_visibility="private", show_progress="hidden")
    return run


def _finished(jobs: Jobs, run: str | None) -> Path:
    folder = jobs.where(run or "")
    if not (folder / "certificate.json").is_file():
        raise InputError(f"no finished run '{run}'")
    return folder


def _verified(folder: Path, certificate: Path) -> list[Any]:
    """The checks of an uploaded certificate against the files of a run, which stay as they are."""
    from palimpsest.report.certificate import NAME
    from palimpsest.report.certificate import verify as check

    if certificate.stat().st_size > 2**22:
        raise InputError("the certificate is larger than 4 MiB: not one of ours")
    with tempfile.TemporaryDirectory() as temporary:
        beside = Path(temporary) / "run"
        shutil.copytree(folder, beside, copy_function=_link, ignore=lambda *_: [NAME])
        shutil.copyfile(certificate, beside / NAME)
        return check(beside)


def _link(source: str, target: str) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _copy(path: str, folder: Path, run: str) -> str:
    target = folder / f"{run}-{Path(path).name}"
    shutil.copyfile(path, target)
    return str(target)
