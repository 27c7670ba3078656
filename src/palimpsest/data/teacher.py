"""`Teacher`: the one way to ask a large model, be it behind any OpenAI-compatible endpoint or in this process.

Many questions are under way at once; every answer is kept under the hash of what was asked as soon as it is there, so
an interrupted job goes on where it stopped and a repeated one costs nothing; what was spent is counted, and can be
limited.  Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from palimpsest.core import cache
from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.core.files import atomic_folder, sha256_of, write_json

_TOKENS_A_MILLION = 1e6


class Generates(Protocol):
    """A model in this process that can be asked (`models.lm.LM` is one)."""

    @property
    def sha256(self) -> str: ...

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[str]: ...


@dataclass
class Spent:
    """What a teacher has been asked since it was made."""

    calls: int = 0  # answered by the model
    cached: int = 0  # answered from what was kept
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the teacher's prices


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked; the same for all prompts of a call, and part of what an answer is kept under."""

    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Teacher:
    """A large model to ask.  Make one with `Teacher.endpoint` or `Teacher.local`."""

    name: str  # of the model
    base_url: str = ""  # of the endpoint; "": OpenAI's own
    model: Generates | None = field(default=None, repr=False)  # asked instead of an endpoint
    api_key: str = field(default="", repr=False)
    prices: tuple[float, float] = (0.0, 0.0)  # of a million prompt tokens, and of a million completion tokens
    limit: float | None = None  # the most that may be spent, in the currency of the prices
    concurrency: int = 16  # questions under way at once
    timeout: float = 120.0  # seconds that one answer may take
    retries: int = 5  # after a failed connection, a full queue or a server's error; the client waits longer each time
    spent: Spent = field(default_factory=Spent, compare=False)

    @staticmethod
    def endpoint(model: str, *, base_url: str = "", api_key: str | None = None, **settings: Any) -> Teacher:
        """A model behind an OpenAI-compatible endpoint (OpenAI, vLLM, Ollama, llama.cpp, ...).

        `base_url` as the `openai` client has it, such as ``http://127.0.0.1:8000/v1``; `api_key` is read from
        ``OPENAI_API_KEY`` where it is None.  `settings` are the fields of `Teacher`.  Raises `MissingExtra` without the
        package `openai`.
        """
        _openai()
        key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
        if not key and not base_url:
            raise InputError(f"no key to ask '{model}' with: set OPENAI_API_KEY, or give the base_url of an endpoint")
        return Teacher(model, base_url, api_key=key or "none", **settings)

    @staticmethod
    def local(lm: Generates, name: str = "local") -> Teacher:
        """A model in this process."""
        return Teacher(name, model=lm)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or min(self.prices) < 0:
            raise InputError(
                f"a teacher with concurrency={self.concurrency}, retries={self.retries}, timeout={self.timeout:g}, "
                f"prices={self.prices} cannot be asked"
            )

    def ask(self, prompts: Sequence[str], **how: Any) -> list[str]:
        """The answer to each prompt, in order; `how` are the fields of `Asking`.  Inside a running event loop (a
        notebook), await `ask_async` instead.

        Raises `InputError` when the endpoint refuses or cannot be reached, and when going on would cost more than
        `limit`.  Answers that came before are kept.
        """
        return asyncio.run(self.ask_async(prompts, **how))

    async def ask_async(self, prompts: Sequence[str], **how: Any) -> list[str]:
        asking = Asking(**how)
        wanted = list(dict.fromkeys(prompts))
        answers = {prompt: kept for prompt in wanted if (kept := self._kept(prompt, asking)) is not None}
        self.spent.cached += len(answers)
        missing = [prompt for prompt in wanted if prompt not in answers]
        if missing and self.model is not None:
            answers |= self._generate(missing, asking)
        elif missing:
            answers |= await self._request_all(missing, asking)
        return [answers[prompt] for prompt in prompts]

    def _generate(self, prompts: list[str], asking: Asking) -> dict[str, str]:
        assert self.model is not None
        texts = [f"{asking.system}\n\n{prompt}" if asking.system else prompt for prompt in prompts]
        said = self.model.generate(
            texts, max_new_tokens=asking.max_tokens, temperature=asking.temperature, seed=asking.seed
        )
        for prompt, answer in zip(prompts, said, strict=True):
            self._keep(prompt, asking, {"answer": answer})
        self.spent.calls += len(prompts)
        return dict(zip(prompts, said, strict=True))

    async def _request_all(self, prompts: list[str], asking: Asking) -> dict[str, str]:
        openai = _openai()
        room = asyncio.Semaphore(self.concurrency)
        client = openai.AsyncOpenAI(
            api_key=self.api_key, base_url=self.base_url or None, timeout=self.timeout, max_retries=self.retries
        )
        async with client:

            async def one(prompt: str) -> str:
                async with room:
                    return await self._request(client, prompt, asking)

            tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
            try:
                return dict(zip(prompts, await asyncio.gather(*tasks), strict=True))
            except openai.OpenAIError as error:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"{self.base_url or 'the endpoint'} did not answer as '{self.name}': {reason}"
                ) from error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _request(self, client: Any, prompt: str, asking: Asking) -> str:
        if self.limit is not None and self.spent.cost >= self.limit:
            raise InputError(f"the teacher's limit is reached: {self.spent.cost:.4g} of {self.limit:g} spent")
        messages = [{"role": "system", "content": asking.system}] if asking.system else []
        response = await client.chat.completions.create(
            model=self.name,
            messages=[*messages, {"role": "user", "content": prompt}],
            max_tokens=asking.max_tokens,
            temperature=asking.temperature,
            seed=asking.seed,
        )
        if not response.choices:
            raise InputError(f"'{self.name}' returned no answer")
        answer = response.choices[0].message.content or ""
        usage = response.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        self.spent.calls += 1
        self.spent.prompt_tokens += tokens[0]
        self.spent.completion_tokens += tokens[1]
        self.spent.cost += (
            sum(price * count for price, count in zip(self.prices, tokens, strict=True)) / _TOKENS_A_MILLION
        )
        self._keep(prompt, asking, {"answer": answer, "tokens": tokens})
        return answer

    def _path(self, prompt: str, asking: Asking) -> Path:
        who = self.model.sha256 if self.model is not None else [self.base_url, self.name]
        return cache.folder("teacher", [who, vars(asking), sha256_of(prompt)])

    def _kept(self, prompt: str, asking: Asking) -> str | None:
        path = self._path(prompt, asking) / "answer.json"
        return json.loads(path.read_text(encoding="utf-8"))["answer"] if path.exists() else None

    def _keep(self, prompt: str, asking: Asking, value: dict[str, Any]) -> None:
        with atomic_folder(self._path(prompt, asking)) as folder:
            write_json(folder / "answer.json", value)


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise MissingExtra("openai", "teacher") from None
    return openai
