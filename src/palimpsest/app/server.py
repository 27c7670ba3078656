"""The web server: on this machine only, on a free port, and what it serves asks nobody else for anything."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InputError, MissingExtra

HOST = "127.0.0.1"
_POLICY = (  # the page works without any of what this forbids; gradio's template asks for fonts and scripts elsewhere
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'"
)


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the web page on this machine: papers, lifecycle, before and after, evidence."""

    runs: str = "palimpsest-runs"  # folder of the runs that the page starts and shows
    results: str | None = None  # what 'palimpsest reproduce' wrote; default: results/claims.jsonl, if it is there
    upload: str = "200mb"  # the largest file that is taken
    port: int | None = None  # default: the first free one from 7860 on
    share: bool = False  # also through a public tunnel: wants --share-password as well
    share_password: str | None = None  # the password that visitors must give (user: palimpsest)


@dataclass(frozen=True)
class Serving:
    """A server that is up."""

    url: str
    public: str | None
    jobs: Any


@contextlib.contextmanager
def serving(options: Ui) -> Iterator[Serving]:
    """The page, up while inside; afterwards its runs are cancelled, with a checkpoint each.

    Raises `InputError` for `share` without a password and the other way round, and for a port that cannot be had.
    """
    if options.share != bool(options.share_password):
        raise InputError(
            "--share puts the page on the internet: give --share and --share-password PASSWORD, or neither"
        )
    if options.port is not None and not 1 <= options.port <= 65535:
        raise InputError(f"--port {options.port}: wanted a number from 1 to 65535")
    if not re.fullmatch(r"\d+\s*(b|kb|mb|gb)", options.upload.lower()):
        raise InputError(f"--upload {options.upload}: wanted a size such as 200mb")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
        from fastapi.middleware import Middleware
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles
    except ImportError as error:
        raise MissingExtra(str(error.name), "ui") from None
    from palimpsest import catalog
    from palimpsest.app import site
    from palimpsest.app.page import build

    page, jobs = build(Path(options.runs), options.results)
    catalog.search("forget a book", k=1)  # loads the encoder before anybody waits for it
    style = (Path(site.__file__).parents[1] / "report" / "templates" / "app.css").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as pages:
        site.write(Path(pages) / "site", options.results)
        try:
            _, url, public = page.launch(
                server_name=HOST,
                server_port=options.port,
                share=options.share,
                auth=("palimpsest", options.share_password) if options.share_password else None,
                max_file_size=options.upload,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                ssr_mode=False,
                pwa=False,
                enable_monitoring=False,
                theme=_theme(gr),
                css=style,
                app_kwargs={
                    "routes": [Mount("/site", StaticFiles(directory=Path(pages) / "site", html=True))],
                    "middleware": [Middleware(_Policy)],
                },
            )
        except OSError as error:
            raise InputError(f"port {options.port or '7860 to 7959'}: {error}") from None
        try:
            yield Serving(url, public, jobs)
        finally:
            jobs.stop()
            page.close(verbose=False)


def _theme(gr: Any) -> Any:
    """The report's colours, and the machine's own fonts."""
    light = {"body_background_fill": "#fbf9f4", "block_background_fill": "#fffefb", "body_text_color": "#25221c"}
    light |= {
        "border_color_primary": "#dfd8ca",
        "input_background_fill": "#fffefb",
        "block_label_text_color": "#6b6458",
    }
    light |= {"button_primary_background_fill": "#17658a", "button_primary_text_color": "#ffffff"}
    dark = {"body_background_fill": "#171614", "block_background_fill": "#1e1c19", "body_text_color": "#ebe5d8"}
    dark |= {"border_color_primary": "#39352e", "input_background_fill": "#171614"}
    dark |= {"block_label_text_color": "#a89f90", "block_title_text_color": "#a89f90"}
    dark |= {"button_primary_background_fill": "#17658a", "button_primary_text_color": "#ffffff"}
    base = gr.themes.Base(font=("ui-sans-serif", "system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return base.set(**light, **{f"{name}_dark": colour for name, colour in dark.items()})


class _Policy:
    """Adds the content security policy to every answer (ASGI)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(options: Ui) -> int:
    """Serve until Ctrl-C; 0."""
    with serving(options) as up:
        print(f"palimpsest is on {up.url} (Ctrl-C ends it)", file=sys.stderr)
        if up.public:
            print(f"and, behind its password, on {up.public}", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
    return 0
