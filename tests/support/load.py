# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Many clients of one server at once, each answer compared with the one expected."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI, AsyncStream

from tests.support.sample import TEXT
from tests.support.server import Server

CANCELLED, MALFORMED = 0.10, 0.05
"""Shares of all requests: streams closed by their client, and requests that are no
request."""

PERIOD_S, LULL_S, LULL_CLIENTS = 20, 2, 2
"""At the end of every period all clients but two pause, so that small batches, which
the slots can hold, follow the large ones, which they cannot."""

MODEL = "sample"


@dataclass(frozen=True)
class Request:
    """A question that has one right answer."""

    chat: bool
    stream: bool
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of one request, or the beginning of it where the stream was closed."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None

    def begins(self, whole: "Answer") -> bool:
        return self.token_ids == whole.token_ids[: len(self.token_ids)]


def requests(count: int) -> list[Request]:
    """Chats and completions, streamed or not; prompts of some to several hundred
    tokens, answers of 1 to 64. Greedy: stock vLLM 0.32 on the CPU ends with "CPU
    Generator does not use offset" when a prompt that is sampled with a seed is
    prefilled in chunks."""
    text = TEXT.read_text()
    pool = []
    for number in range(count):
        chance = random.Random(number)
        prompt = text[chance.randrange(4000) :][: int(10 * 250 ** chance.random())]
        body: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": int(64 ** chance.random()) if number % 3 else 64,
            "temperature": 0,
            "extra_body": {"return_token_ids": True, "ignore_eos": bool(number % 2)},
        }
        chat = number % 4 < 2
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        pool.append(Request(chat, number % 2 == 0, body))
    return pool


def malformed() -> list[tuple[str, str, bytes]]:
    """Method, path and body of what no server should take."""
    completion, chat = "/v1/completions", "/v1/chat/completions"
    good = '"model": "sample", "prompt": "You may", "max_tokens": 4'
    bodies = [
        (completion, b""),
        (completion, b'{"model": "sample", "prompt": '),
        (completion, b"\xff\xfe\x00"),
        (completion, b"[]"),
        (completion, b'{"model": "sample"}'),
        (completion, b'{"model": "another", "prompt": "You may", "max_tokens": 4}'),
        (completion, f'{{{good}, "max_tokens": -1}}'.encode()),
        (completion, f'{{{good}, "max_tokens": 100000}}'.encode()),
        (completion, f'{{{good}, "temperature": "hot"}}'.encode()),
        (completion, f'{{{good}, "temperature": -2}}'.encode()),
        (completion, f'{{{good}, "top_p": 7}}'.encode()),
        (completion, f'{{{good}, "n": 0}}'.encode()),
        (completion, f'{{{good}, "prompt": "{"You may " * 9000}"}}'.encode()),
        (completion, f'{{{good}, "prompt": [1, 2, 10000000]}}'.encode()),
        (completion, f'{{{good}, "prompt": {{"text": 3}}}}'.encode()),
        (chat, b'{"model": "sample", "messages": "You may"}'),
        (chat, b'{"model": "sample", "messages": [{"role": 4, "content": []}]}'),
        (
            chat,
            b'{"model": "sample", "messages": [{"content": "nobody"}],'
            b' "max_tokens": 4}',
        ),
        ("/v1/nothing", b"{}"),
    ]
    return [("POST", path, body) for path, body in bodies] + [("GET", completion, b"")]


async def refusal(http: httpx.AsyncClient, method: str, path: str, body: bytes) -> int:
    """The status that a malformed request is answered with."""
    headers = {"Content-Type": "application/json"}
    return (await http.request(method, path, content=body, headers=headers)).status_code


async def ask(client: AsyncOpenAI, request: Request, cut: int | None = None) -> Answer:
    """Asks, and closes the stream once `cut` tokens are there."""
    endpoint = client.chat.completions if request.chat else client.completions
    answer = await endpoint.create(**request.body, stream=request.stream)  # type: ignore[attr-defined]
    if not isinstance(answer, AsyncStream):
        choice = answer.choices[0]
        text = choice.message.content if request.chat else choice.text
        return Answer(tuple(choice.token_ids), text or "", choice.finish_reason)
    token_ids: list[int] = []
    text, finish_reason = "", None
    async with answer:
        async for event in answer:
            for choice in event.choices:
                text += (choice.delta.content if request.chat else choice.text) or ""
                token_ids += getattr(choice, "token_ids", None) or []
                finish_reason = choice.finish_reason or finish_reason
            if cut is not None and len(token_ids) >= cut and finish_reason is None:
                break
    return Answer(tuple(token_ids), text, finish_reason)


async def answers(
    server: Server, pool: Sequence[Request], at_once: int = 1
) -> list[Answer]:
    """The answers to all of `pool`, in its order."""
    turn = asyncio.Semaphore(at_once)

    async def one(client: AsyncOpenAI, request: Request) -> Answer:
        async with turn:
            return await ask(client, request)

    async with server.http(at_once) as http:
        client = server.async_client(http)
        return await asyncio.gather(*(one(client, request) for request in pool))


async def refusals(server: Server) -> list[int]:
    """The status of every malformed request, in their order."""
    async with server.http() as http:
        return [await refusal(http, *one) for one in malformed()]


@dataclass
class Expected:
    """What is right, by a server that is trusted: an answer per request, a status per
    refusal."""

    pool: list[Request]
    answers: list[Answer]
    refusals: list[int]

    @classmethod
    async def of(cls, server: Server, pool: list[Request]) -> "Expected":
        return cls(pool, await answers(server, pool), await refusals(server))


@dataclass
class Tally:
    """How the requests of a load ended, and every one that ended wrongly."""

    ended: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


class Load:
    """Clients that each ask one request after the other, chosen by a seed, until time
    is up."""

    def __init__(self, server: Server, expected: Expected, clients: int, seed: int = 0):
        self._server = server
        self._expected = expected
        self._clients = clients
        self._seed = seed
        self._malformed = malformed()
        self._streamed = [
            number
            for number, request in enumerate(expected.pool)
            if request.stream and len(expected.answers[number].token_ids) > 1
        ]
        self.tally = Tally()

    async def run(self, seconds: float) -> Tally:
        begin = time.monotonic()
        async with self._server.http(self._clients) as http:
            one = (
                self._client(http, number, begin, seconds)
                for number in range(self._clients)
            )
            await asyncio.gather(*one)
        return self.tally

    async def _client(
        self, http: httpx.AsyncClient, number: int, begin: float, seconds: float
    ) -> None:
        chance = random.Random(f"{self._seed} {number}")
        while (elapsed := time.monotonic() - begin) < seconds:
            lull = elapsed % PERIOD_S - (PERIOD_S - LULL_S)
            if lull >= 0 and number >= LULL_CLIENTS:
                await asyncio.sleep(LULL_S - lull)
                continue
            try:
                await self._one(http, chance)
            except Exception as error:
                cause = error.__cause__ or error
                self.tally.wrong.append(f"client {number}: {error}: {cause!r}")

    async def _one(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        tally, expected, share = self.tally, self._expected, chance.random()
        if share < MALFORMED:
            number = chance.randrange(len(self._malformed))
            status, right = (
                await refusal(http, *self._malformed[number]),
                expected.refusals[number],
            )
            tally.ended["malformed"] += 1
            if status != right or not 400 <= status < 500:
                tally.wrong.append(
                    f"malformed request {number}: {status} instead of {right}"
                )
            return
        cut = None
        if share < MALFORMED + CANCELLED:
            number = chance.choice(self._streamed)
            cut = chance.randrange(1, len(expected.answers[number].token_ids))
        else:
            number = chance.randrange(len(expected.pool))
        client, right = self._server.async_client(http), expected.answers[number]
        answer = await ask(client, expected.pool[number], cut)
        cancelled = cut is not None and answer.finish_reason is None
        tally.ended["cancelled" if cancelled else "finished"] += 1
        tally.tokens += len(answer.token_ids)
        if not (answer.begins(right) if cancelled else answer == right):
            tally.wrong.append(
                f"request {number}, cut {cut}: {answer} instead of {right}"
            )
