"""The web page over HTTP, and in a browser where there is one: search, run and cancel, ask, verify."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio_client", reason="the extra 'ui' is not installed")

from palimpsest.app.server import Ui, serving
from palimpsest.cli import main
from palimpsest.core.errors import InputError
from palimpsest.data.world import World

EVIL = "<script>alert(1)</script>"
NAMELESS = """[...document.querySelectorAll("input, textarea, select, button")]
    .filter(e => e.offsetParent)
    .filter(e => !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim() || e.placeholder))
    .map(e => e.outerHTML.slice(0, 200))"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Page:
    """A server in a process of its own, asked over plain HTTP as gradio's clients do."""

    url: str
    said: str

    def predict(self, name: str, *values: Any) -> str:
        body = json.dumps({"data": values}).encode()
        event = json.loads(self._post(f"gradio_api/call/{name}", body, "application/json"))["event_id"]
        with urllib.request.urlopen(f"{self.url}gradio_api/call/{name}/{event}") as stream:
            text = stream.read().decode()
        assert "event: complete" in text, text
        return json.loads(text[text.rindex("data: ") + 6 :])[0]

    def upload(self, path: Path) -> dict[str, Any]:
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + b"\r\n--b--\r\n"
        (there,) = json.loads(self._post("gradio_api/upload", body, "multipart/form-data; boundary=b"))
        return {"path": there, "meta": {"_type": "gradio.FileData"}}

    def _post(self, path: str, body: bytes, kind: str) -> bytes:
        asked = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(asked) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Iterator[Path]:
    """A folder with one finished run, whose records hold markup."""
    folder = tmp_path_factory.mktemp("runs")
    world = World(people=12, facts=3, seed=5)
    request = world.request()
    paths = {}
    for name, table in (("forget", request.forget), ("retain", request.retain)):
        assert table is not None
        paths[name] = folder / f"{name}.jsonl"
        rows = [{key: value for key, value in row.items() if value is not None} for row in table]
        rows = [{**row, "prompt": f"{row['prompt']} {EVIL}"} if "prompt" in row else row for row in rows]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(session_cache))
        patch.setenv("HOME", str(folder))  # the certificate's key
        arguments = ["--forget", str(paths["forget"]), "--retain", str(paths["retain"]), "--out", str(folder / "one")]
        small = ["--config", "llama-tiny", "--train-epochs", "1", "--steps", "2", "--lr", "0.001"]
        assert main(["run", *arguments, *small]) == 0
        yield folder


@pytest.fixture(scope="module")
def up(runs: Path, session_cache: Path) -> Iterator[Page]:
    empty = runs / "none.jsonl"
    empty.touch()
    command = [
        sys.executable,
        "-m",
        "palimpsest",
        "ui",
        "--runs",
        str(runs),
        "--results",
        str(empty),
        "--upload",
        "1mb",
    ]
    settings = {"PALIMPSEST_CACHE": str(session_cache), "HOME": str(runs), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | settings) as process:
        assert process.stderr is not None
        try:
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r"palimpsest is on (http://\S+)", line):
                    yield Page(found[1], said)
                    break
            else:
                raise AssertionError(said)
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()
        assert process.wait() == 0


def test_it_listens_on_this_machine_only_and_forbids_the_rest_of_the_world(up):
    assert up.url.startswith("http://127.0.0.1:")
    assert "public" not in up.said
    with urllib.request.urlopen(up.url) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file={runs}/one/model/model.safetensors",
        "site/../../etc/passwd",
        "site/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    ],
)
def test_no_path_leads_out(up, runs, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(up.url + path.format(runs=runs))
    with refused.value as answer:
        assert answer.code in (403, 404)


def test_search_finds_by_meaning_and_leads_to_the_pages(up):
    found = up.predict("papers", "make a model forget a book", "all", "all", "newest first")
    assert "site/papers/whp.html" in found[: found.index("</li>")]
    with urllib.request.urlopen(up.url + "site/papers/whp.html") as page:
        assert "Harry Potter" in page.read().decode()
    assert "No paper fits" in up.predict("papers", "forget a book", "pretrain", "holds", "newest first")


def test_fifty_people_ask_at_once_and_are_answered_in_batches(up):
    with ThreadPoolExecutor(50) as people:
        answers = list(people.map(lambda n: up.predict("ask", "one", f"Where is person {n}? {EVIL}"), range(50)))
    for n, answer in enumerate(answers):
        assert f"person {n}?" in answer
        assert "Before" in answer
        assert "Reference" in answer
        assert EVIL not in answer
    with urllib.request.urlopen(up.url + "config") as config:
        (ask,) = [one for one in json.load(config)["dependencies"] if one["api_name"] == "ask"]
    assert ask["batch"]
    assert ask["max_batch_size"] >= 50


def test_wrong_questions_are_one_line_each(up):
    assert "an empty question" in up.predict("ask", "one", "  ")
    assert "2,001 characters" in up.predict("ask", "one", "x" * 2001)
    assert "choose a finished run" in up.predict("ask", None, "Who?")


def test_a_certificate_with_one_changed_byte_is_refused(up, runs, tmp_path):
    good = runs / "one" / "certificate.json"
    bad = tmp_path / "certificate.json"
    text = good.read_text()
    place = text.index('"measurements"')
    digit = next(n for n in range(place, len(text)) if text[n].isdigit())
    bad.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert "Every check passed" in up.predict("verify", "one", up.upload(good))
    assert "do not trust it" in up.predict("verify", "one", up.upload(bad))
    bad.write_text("[" * 100000)
    assert "do not trust it" in up.predict("verify", "one", up.upload(bad))
    assert good.read_text() == text


def test_what_is_too_large_or_of_another_kind_is_refused(up, tmp_path):
    large = tmp_path / "certificate.json"
    large.write_bytes(b" " * 1_100_000)
    with pytest.raises(urllib.error.HTTPError) as refused:
        up.upload(large)
    with refused.value as answer:
        assert answer.code == 413
    program = tmp_path / "certificate.sh"
    program.write_text("echo")
    with pytest.raises(AssertionError, match="event: error"):
        up.predict("verify", "one", up.upload(program))


@pytest.mark.parametrize("size", ["", "much", "-1mb"])
def test_a_size_that_is_none_is_one_line(size):
    with pytest.raises(InputError, match="wanted a size such as 200mb"), serving(Ui(upload=size)):
        pass


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none_is_one_line(port):
    with pytest.raises(InputError, match="wanted a number from 1 to 65535"), serving(Ui(port=port)):
        pass


def test_sharing_is_asked_for_twice():
    for options in (Ui(share=True), Ui(share_password="secret")):
        with pytest.raises(InputError, match="puts the page on the internet"), serving(options):
            pass


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(up, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(up.url)
            page.wait_for_selector(".pal-cards")
            page.wait_for_function("document.querySelectorAll('button[role=tab]').length >= 2")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            dark = sum(map(int, background[background.index("(") + 1 : -1].split(",")[:3])) < 200
            assert dark == (scheme == "dark")
            page.close()
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)  # models are loaded on a machine that does other things
        page.goto(up.url)
        page.get_by_label("Search by meaning").press_sequentially("make a model forget a book")
        page.wait_for_function("document.querySelector('.pal-cards h3').innerText.includes('Harry Potter')")

        page.get_by_role("tab", name="Papers").focus()
        page.keyboard.press("Tab")
        for _ in range(3):
            if page.evaluate("document.activeElement.innerText") == "Lifecycle":
                break
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the tabs are reached and opened without a mouse
        page.wait_for_selector("text=Records that must go")
        unnamed = page.evaluate(NAMELESS)
        assert unnamed == [], unnamed
        page.get_by_role("button", name="Run (goes on").click()
        page.wait_for_selector("text=running")
        page.get_by_role("button", name="Cancel after this step").click()
        page.wait_for_selector("text=/cancelled|failed/", timeout=60_000)

        page.get_by_role("tab", name="Before / after").click()
        run = page.get_by_label("Finished run").locator("visible=true").first
        run.focus()
        page.get_by_role("option", name="one").locator("visible=true").first.click()
        page.get_by_label("Your question").fill("Where does anybody live?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".pal-answers")
        page.get_by_label("Questions from the forget and retain sets").locator("visible=true").first.focus()
        asked = page.get_by_role("option").locator("visible=true").first
        words = asked.inner_text().split(": ", 1)[1].strip()
        asked.click()
        page.wait_for_function(
            "words => document.querySelector('#question textarea, #question input').value === words", arg=words
        )
        browser.close()
