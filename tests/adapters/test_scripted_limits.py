"""The scripted provider refuses what real ones refuse, says so as they do, and counts it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest

from keepstream.errors import ErrorCode
from keepstream_worker.dev_stack.scripted_provider import ScriptedProvider
from keepstream_worker.dev_stack.scripted_provider.limiter import Admission, Limiter, Refusal, spelled
from keepstream_worker.limits import RateLimits
from keepstream_worker.providers.config import parse_providers
from keepstream_worker.providers.provider import ProviderFailure, Providers, Timeouts

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
QUICK = {"deltas": 10}
ENDLESS = {"deltas": 1_000_000, "rate": 20}


@pytest.fixture
async def client(scripted_provider: ScriptedProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=scripted_provider.base_url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(scripted_provider: ScriptedProvider) -> AsyncIterator[httpx2.AsyncClient]:
    base_url = scripted_provider.base_url.removesuffix("/v1")
    async with httpx2.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as http:
        yield http


async def begin(client: openai.AsyncOpenAI, script: dict[str, Any], model: str = "m") -> openai.AsyncStream[Any]:
    stream: openai.AsyncStream[Any] = await client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, extra_body={"script": script}
    )
    return stream


async def complete(client: openai.AsyncOpenAI, script: dict[str, Any] = QUICK, model: str = "m") -> None:
    async for _ in await begin(client, script, model):
        pass


async def comes_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # the server tells nobody
            await asyncio.sleep(0.005)


# -- against a client --


async def test_so_many_streams_at_once_are_served_and_the_next_is_refused(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI
):
    scripted_provider.limit({"concurrency": 3})
    streams = [await begin(client, ENDLESS) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as caught:
        await begin(client, QUICK)
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "concurrency")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["retry-after-ms"] == "1000"
    await streams[0].close()
    await comes_true(lambda: scripted_provider.limiter.report["streams"] == 2)
    await complete(client)
    report = scripted_provider.limiter.report
    assert (report["accepted"], report["refused"]) == (4, {"concurrency": 1})
    assert (report["peak_streams"], report["peak_asked"]) == (3, 4)
    for stream in streams:
        await stream.close()
    await comes_true(lambda: scripted_provider.limiter.report["streams"] == 0)


async def test_requests_of_a_minute_are_counted_and_headers_state_what_is_left(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI
):
    scripted_provider.limit({"requests_per_minute": 2})
    stream = await begin(client, QUICK)
    headers = stream.response.headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in headers
    await stream.close()
    await complete(client)
    with pytest.raises(openai.RateLimitError, match="requests per min") as caught:
        await complete(client)
    headers = caught.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(headers["retry-after"]) <= 60
    assert 0 < int(headers["retry-after-ms"]) <= 60_000
    assert caught.value.type == "requests"


async def test_tokens_of_a_minute_are_counted_with_all_that_a_request_will_take(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI
):
    scripted_provider.limit({"tokens_per_minute": 1000})
    await complete(client, {"deltas": 500})
    with pytest.raises(openai.RateLimitError, match="tokens per min") as caught:
        await complete(client, {"deltas": 500})
    assert caught.value.type == "tokens"
    with pytest.raises(openai.RateLimitError, match="Request too large") as caught:
        await complete(client, {"deltas": 2000})
    assert "retry-after" not in caught.value.response.headers  # no minute will do
    (second, *_) = scripted_provider.limiter.report["seconds"]
    assert second["accepted"] == 1
    assert second["tokens"] > 500


async def test_what_is_refused_is_no_attempt_of_its_script(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI
):
    script = {"key": "k", "deltas": 1, "faults": [{"kind": "status", "status": 500}]}
    scripted_provider.limit({"concurrency": 0})
    with pytest.raises(openai.RateLimitError):
        await complete(client, script)
    scripted_provider.limit({"concurrency": None})
    with pytest.raises(openai.InternalServerError):
        await complete(client, script)
    await complete(client, script)


async def test_each_model_may_have_its_own_limits(scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI):
    scripted_provider.limit({"requests_per_minute": 1, "per_model": True})
    await complete(client, model="a")
    await complete(client, model="b")
    with pytest.raises(openai.RateLimitError):
        await complete(client, model="a")


async def test_limits_are_changed_shown_and_reset_by_http(http: httpx2.AsyncClient, client: openai.AsyncOpenAI):
    changed = await http.post("/_limits", json={"requests_per_minute": 1, "headers": False})
    assert changed.json()["limits"]["requests_per_minute"] == 1
    stream = await begin(client, QUICK)
    assert not any("ratelimit" in name for name in stream.response.headers)
    await stream.close()
    with pytest.raises(openai.RateLimitError):
        await complete(client)
    assert (await http.get("/_limits")).json()["refused"] == {"requests": 1}
    await http.post("/_reset")
    report = (await http.get("/_limits")).json()
    assert (report["accepted"], report["refused"], report["seconds"]) == (0, {}, [])
    await complete(client)  # what was used is forgotten, the limit is not
    assert report["limits"]["requests_per_minute"] == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"concurency": 1}, "limits.concurency"),
        ({"tokens_per_minute": 0}, "limits.tokens_per_minute"),
        ({"breakdown": {"kind": "refuse"}}, "limits.breakdown.seconds"),
        ([], "limits must be an object"),
    ],
)
async def test_wrong_limits_are_refused_and_change_nothing(
    scripted_provider: ScriptedProvider, http: httpx2.AsyncClient, changes: object, complaint: str
):
    before = scripted_provider.limiter.limits
    answer = await http.post("/_limits", json=changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(complaint)
    assert scripted_provider.limiter.limits == before


async def test_a_model_that_is_unknown_for_good(scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI):
    scripted_provider.limit({"unknown_models": ["gone"]})
    with pytest.raises(openai.NotFoundError) as caught:
        await complete(client, model="gone")
    assert caught.value.code == "model_not_found"
    await complete(client, model="here")


async def test_a_prompt_that_is_too_long(scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI):
    scripted_provider.limit({"context_tokens": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(client)
    assert caught.value.code == "context_length_exceeded"


# -- breakdowns --


async def test_a_breakdown_answers_with_500_until_it_is_over(
    scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI
):
    scripted_provider.limit({"breakdown": {"kind": "error"}})
    with pytest.raises(openai.InternalServerError):
        await complete(client)
    scripted_provider.limit({"breakdown": None})
    await complete(client)
    assert scripted_provider.limiter.report["refused"] == {"breakdown": 1}


async def test_a_breakdown_may_end_by_itself(scripted_provider: ScriptedProvider, client: openai.AsyncOpenAI):
    scripted_provider.limit({"breakdown": {"kind": "error", "seconds": 2.0}})
    with pytest.raises(openai.InternalServerError):
        await complete(client)
    await comes_true(lambda: scripted_provider.limiter.limits.breakdown is None)
    await complete(client)


async def test_a_breakdown_may_refuse_connections_and_cut_streams(
    scripted_provider: ScriptedProvider, http: httpx2.AsyncClient, client: openai.AsyncOpenAI
):
    async def refused(call: Callable[[], Awaitable[object]]) -> bool:
        try:
            await call()
        except (openai.APIConnectionError, httpx2.TransportError):
            return True
        return False

    async def until(call: Callable[[], Awaitable[object]], *, is_refused: bool) -> None:
        async with asyncio.timeout(60):
            while await refused(call) != is_refused:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.02)

    stream = await begin(client, ENDLESS)
    answer = await http.post("/_limits", json={"breakdown": {"kind": "refuse", "seconds": 600}})
    assert answer.status_code == 200
    with pytest.raises((openai.APIConnectionError, httpx2.TransportError)):
        async for _ in stream:
            pass
    await until(lambda: complete(client), is_refused=True)
    scripted_provider.limit({"breakdown": None})
    await until(lambda: complete(client), is_refused=False)  # at the same address
    assert (await http.get("/_limits")).json()["limits"]["breakdown"] is None


# -- what Keepstream makes of it --


async def test_keepstream_reads_limits_and_refusals_as_they_are_meant(scripted_provider: ScriptedProvider):
    scripted_provider.limit({"requests_per_minute": 600, "tokens_per_minute": 10_000, "unknown_models": ["gone"]})
    providers = Providers(parse_providers(f'[providers.p]\nbase_url = "{scripted_provider.base_url}"', {}))
    request: dict[str, Any] = {"model": "m", "messages": MESSAGES, "script": QUICK}
    timeouts = Timeouts(60, 60, 60)

    async def ask(**more: Any) -> RateLimits | None:
        async with providers.get("p").stream(request | more, timeouts) as stream:
            async for _ in stream:
                pass
            return stream.rate_limits

    async def failure(**more: Any) -> ProviderFailure:
        with pytest.raises(ProviderFailure) as caught:
            await ask(**more)
        return caught.value

    try:
        rates = await ask()
        assert rates is not None
        assert (rates.requests_per_minute, rates.tokens_per_minute, rates.remaining_requests) == (600, 10_000, 599)
        assert (await failure(model="gone")).failure.code is ErrorCode.NOT_FOUND
        scripted_provider.limit({"tokens_per_minute": 20})
        assert (await failure()).failure.code is ErrorCode.PAYLOAD_TOO_LARGE
        scripted_provider.limit({"concurrency": 0, "retry_after": 2.5})
        refusal = (await failure()).failure
        assert (refusal.code, refusal.retry_after) == (ErrorCode.RATE_LIMITED, 2.5)
        assert refusal.rate_limits is not None
        assert refusal.rate_limits.requests_per_minute == 600
        scripted_provider.limit({"context_tokens": 1})
        assert (await failure()).failure.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    finally:
        await providers.aclose()


def test_limits_may_come_by_the_command_line() -> None:
    command = [sys.executable, "-m", "keepstream_worker.dev_stack.scripted_provider", "--limits"]
    with subprocess.Popen([*command, '{"concurrency": 7}'], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            base_url = json.loads(process.stdout.readline())["base_url"]
            answer = httpx2.get(base_url.removesuffix("/v1") + "/_limits", trust_env=False, timeout=60)
            assert answer.json()["limits"]["concurrency"] == 7
        finally:
            process.terminate()
    wrong = subprocess.run([*command, '{"concurency": 7}'], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "limits.concurency" in wrong.stderr


# -- rates, by a clock of our own --


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(**limits: Any) -> tuple[Limiter, Clock]:
    clock = Clock()
    made = Limiter(clock)
    made.change(limits)
    return made, clock


def ask(limiter: Limiter, times: int, tokens: int = 10) -> list[Admission | Refusal]:
    answers = [limiter.admit("m", 1, tokens) for _ in range(times)]
    for answer in answers:
        if isinstance(answer, Admission):
            limiter.release(answer)
    return answers


def served(answers: list[Admission | Refusal]) -> int:
    return sum(isinstance(answer, Admission) for answer in answers)


def test_a_window_is_full_again_all_at_once() -> None:
    made, clock = limiter(requests_per_minute=60)
    assert served(ask(made, 100)) == 60
    clock.now += 59
    (refusal,) = ask(made, 1)
    assert isinstance(refusal, Refusal)
    assert refusal.headers["retry-after-ms"] == "1000"
    assert refusal.headers["x-ratelimit-reset-requests"] == "1s"
    clock.now += 1
    assert served(ask(made, 100)) == 60
    clock.now += 60 * 5 + 30  # nobody saves up
    assert served(ask(made, 100)) == 60
    clock.now += 30
    assert served(ask(made, 100)) == 60


def test_a_bucket_fills_steadily() -> None:
    made, clock = limiter(requests_per_minute=60, rates="buckets")
    assert served(ask(made, 100)) == 60
    (refusal,) = ask(made, 1)
    assert isinstance(refusal, Refusal)
    assert refusal.headers["retry-after-ms"] == "1000"
    assert refusal.headers["x-ratelimit-reset-requests"] == "1m0s"
    clock.now += 5
    assert served(ask(made, 100)) == 5
    clock.now += 3600
    assert served(ask(made, 100)) == 60


def test_nothing_is_charged_for_what_another_limit_refuses() -> None:
    made, clock = limiter(requests_per_minute=60, tokens_per_minute=100)
    assert served(ask(made, 50, tokens=10)) == 10
    clock.now += 60
    assert served(ask(made, 60, tokens=1)) == 60
    assert made.report["refused"] == {"tokens": 40}


def test_counts_are_kept_by_second() -> None:
    made, clock = limiter(requests_per_minute=3)
    ask(made, 2)
    clock.now += 7
    ask(made, 2)
    assert made.report["seconds"] == [
        {"second": 0, "accepted": 2, "refused": 0, "tokens": 20},
        {"second": 7, "accepted": 1, "refused": 1, "tokens": 10},
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.12, "120ms"),
        (0.0001, "1ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3661, "1h1m1s"),
    ],
)
def test_durations_are_spelled_as_openai_does(seconds: float, text: str) -> None:
    assert spelled(seconds) == text
