from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.teacher import Teacher

pytest.importorskip("openai")


class Endpoint:
    """An OpenAI-compatible endpoint on this machine: answers a prompt with its own words backwards."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.refuse: int = 0  # requests to refuse with `status` first
        self.status = 500
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(request)
                endpoint.keys.append(self.headers["Authorization"])
                status, body = endpoint.answer(request)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, request: dict[str, Any]) -> tuple[int, bytes]:
        prompt = request["messages"][-1]["content"]
        if self.refuse > 0 or "poison" in prompt:
            self.refuse -= 1
            return self.status, json.dumps({"error": {"message": "not today"}}).encode()
        said = " ".join(reversed(prompt.split()))
        message = {"role": "assistant", "content": said}
        value = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
        }
        return 200, json.dumps(value).encode()


@pytest.fixture
def endpoint(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    thread.join()


def teacher(endpoint: Endpoint, **settings: Any) -> Teacher:
    return Teacher.endpoint("big", base_url=endpoint.url, api_key="secret", **({"retries": 0} | settings))


def test_answers_come_in_order_each_question_once(endpoint: Endpoint) -> None:
    asked = teacher(endpoint)
    prompts = [f"one two {n}" for n in range(12)] + ["one two 3"]
    answers = asked.ask(prompts, system="Be brief.", max_tokens=7, temperature=0.5, seed=4)
    assert answers == [f"{n} two one" for n in range(12)] + ["3 two one"]
    assert len(endpoint.requests) == 12
    request = endpoint.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["model"], request["max_tokens"], request["temperature"], request["seed"]) == ("big", 7, 0.5, 4)
    assert set(endpoint.keys) == {"Bearer secret"}


def test_costs_are_counted_and_kept_answers_cost_nothing(endpoint: Endpoint) -> None:
    asked = teacher(endpoint, prices=(2.0, 10.0))
    asked.ask(["a b", "c d"])
    assert asked.spent.calls == 2
    assert (asked.spent.prompt_tokens, asked.spent.completion_tokens) == (20, 8)
    assert asked.spent.cost == pytest.approx((20 * 2 + 8 * 10) / 1e6)
    again = teacher(endpoint)
    assert again.ask(["c d", "a b", "e f"]) == ["d c", "b a", "f e"]
    assert (again.spent.calls, again.spent.cached) == (1, 2)
    again.ask(["a b"], temperature=1.0)  # another way of asking is another question
    assert again.spent.calls == 2


def test_what_was_answered_before_a_failure_is_kept(endpoint: Endpoint) -> None:
    asked = teacher(endpoint, concurrency=1)
    with pytest.raises(InputError, match=r"did not answer as 'big': .*not today"):
        asked.ask(["a b", "c d", "poison", "e f"])
    before = len(endpoint.requests)
    assert asked.ask(["a b", "c d", "e f"]) == ["b a", "d c", "f e"]
    assert len(endpoint.requests) == before + 1


def test_a_server_error_is_tried_again(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.0)
    endpoint.refuse = 1
    assert teacher(endpoint, retries=2).ask(["a b"]) == ["b a"]
    assert len(endpoint.requests) == 2


def test_the_limit_stops_further_questions(endpoint: Endpoint) -> None:
    asked = teacher(endpoint, prices=(1e6, 0.0), limit=15.0, concurrency=1)  # ten a question
    with pytest.raises(InputError, match="limit is reached: 20 of 15 spent"):
        asked.ask([f"a {n}" for n in range(5)])
    assert asked.spent.calls == 2


def test_inside_an_event_loop(endpoint: Endpoint) -> None:
    assert asyncio.run(teacher(endpoint).ask_async(["a b"])) == ["b a"]


class Local:
    sha256 = "0" * 64

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        self.asked += prompts
        return [f"{prompt}!" for prompt in prompts]


def test_a_local_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    local = Local()
    asked = Teacher.local(local)
    assert asked.ask(["a", "b", "a"]) == ["a!", "b!", "a!"]
    assert Teacher.local(local).ask(["b"], system="") == ["b!"]
    assert local.asked == ["a", "b"]
    assert asked.ask(["c"], system="Hear:") == ["Hear:\n\nc!"]


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        Teacher.endpoint("big")
    with pytest.raises(InputError, match="cannot be asked"):
        Teacher("big", concurrency=0)
    assert "secret" not in repr(Teacher.endpoint("big", api_key="secret"))
