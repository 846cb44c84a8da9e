"""Providers: one streaming chat completion from an OpenAI-compatible provider.

In: a job's request and its time-outs, from the engine.
Out: the answer's bytes as they arrive, or a ``ProviderFailure``; no exception of a library escapes.

The openai SDK supplies base URLs, Azure's paths and headers, once for each path. Its part ends there: it reads keys
once, its decoder loses events, and its chunk objects cost ten times as much as everything else together.
"""

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, NamedTuple, Self, TypeVar, cast

import httpx2
import openai
import orjson

from keepstream.errors import ErrorCode
from keepstream.next_turn import ITEMS_FIELD
from keepstream_worker.providers import words
from keepstream_worker.providers.config import ProviderConfig
from keepstream_worker.providers.dialects.choice import (
    only_by_responses,
    refuses_encrypted_reasoning,
    refuses_returned_items,
    wants_responses,
)
from keepstream_worker.providers.dialects.responses_request import NotExpressibleError, ResponsesOptions
from keepstream_worker.providers.dialects.responses_request import encode as encode_response
from keepstream_worker.providers.http import Body, Head, HeadRecorder, HttpTransport, ProviderFailure
from keepstream_worker.providers.keys import key_of
from keepstream_worker.telemetry.logs import get_logger
from keepstream_worker.values import Failure

log = get_logger()

__all__ = ["Provider", "ProviderCheck", "ProviderFailure", "ProviderStream", "Providers", "Timeouts"]

_DRAIN_SECONDS: Final = 0.1  #: To read the end of a body, which follows the last event at once.
_CHECK_INTERVAL: Final = 5.0  #: Seconds for which a connection that aiohttp closed silently may go unnoticed.
_REFUSAL_SECONDS: Final = 6.0  #: More than the transport waits for the body of a refusal.
_SECOND_CHECK: Final = 0.05  #: Seconds; on a busy loop, data may be waiting in a socket.
_CHECK_SECONDS: Final = 10.0
_REFUSED_REQUEST: Final = frozenset({400, 404, 405, 422, 501})
_NO_ENDPOINT: Final = frozenset({404, 405})
_MAX_MODELS: Final = 1024  #: Of which is remembered what they refuse.
_CHAT: Final = "/chat/completions"
_RESPONSES: Final = "/responses"
_MODELS: Final = "/models"
_MAX_HEADS: Final = 256  #: Cached heads; paths differ only by Azure's deployments.
_SECURITY: Final[Any] = {"bearer_auth": True}  #: Never send the administrator's key, even if the environment holds one.
_MODEL_LIST_BYTES: Final = 4 * 1024 * 1024

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    connect: float  #: To establish the connection, TLS included.
    first_token: float  #: From the request to the first data.
    idle: float  #: Between two data events, not counting comments.
    #: From the request to the first output where it is asked by the Responses API; None: as ``first_token``.
    first_token_by_responses: float | None = None


class ProviderCheck(NamedTuple):
    """The result of checking a provider."""

    ok: bool
    line: str  #: One line to show to people.
    advice: str = ""  #: What to do, where that is known.


class _Watchdog:
    """Ends a wait when the provider has sent no data for too long, or when the connection is already lost.

    One timer checks every few seconds when data last came, so that a chunk costs an assignment rather than a timer.
    Only waits inside ``wait_for`` are cancelled, so the caller never sees a cancellation it did not request.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())  # a coroutine always runs in a task
        self._cancellations = self._task.cancelling()
        self._idle = timeouts.idle
        self.connect = timeouts.connect
        self._limit = timeouts.first_token
        self._last_data = self._loop.time()
        self._any_data = self._waiting = self._overdue = False
        self._failure: Failure | None = None
        self.body: Body | None = None  #: The response's body, once there is a response.
        self._check_in(self._limit)

    def note_data(self) -> None:
        self._last_data = self._loop.time()
        if not self._any_data:
            self._any_data = True
            self._limit = self._idle
            self._timer.cancel()
            self._check_in(self._limit)

    def expect_first_data_within(self, seconds: float) -> None:
        """Allow so much from the beginning to the first data."""
        if not self._any_data:
            self._limit = seconds
            self._timer.cancel()
            self._check_in(seconds)

    def note_refusal(self) -> None:
        """Allow for the body of a refusal, which has a limit of its own: the status alone says more than a time-out."""
        self.expect_first_data_within(self._limit + _REFUSAL_SECONDS)

    def _check_in(self, seconds: float) -> None:
        self._timer = self._loop.call_later(min(seconds, _CHECK_INTERVAL), self._check)

    def _check(self) -> None:
        left = self._last_data + self._limit - self._loop.time()
        if self._waiting and self.body and self.body.lost:
            self._cut(ErrorCode.CONNECTION, "the answer broke off: its framing is not HTTP")
        elif left > 0:
            self._overdue = False
            self._check_in(left)
        elif self._waiting and self._overdue:
            what = "no further data" if self._any_data else "no data"
            self._cut(ErrorCode.TIMEOUT, f"{what} from the provider within {self._limit:g} s")
        else:
            self._overdue = True
            self._check_in(_SECOND_CHECK)

    def _cut(self, code: ErrorCode, message: str) -> None:
        status, request_id = (self.body.status, self.body.request_id) if self.body else (None, None)
        self._failure = Failure(code=code, message=message, http_status=status, provider_request_id=request_id)
        self._task.cancel()

    async def wait_for(self, awaitable: Awaitable[_T]) -> _T:
        """Await ``awaitable``; raise ``ProviderFailure`` if the provider sends no data for too long meanwhile."""
        self._waiting = True
        try:
            return await awaitable
        except asyncio.CancelledError:
            # As in asyncio.timeout: if the task was cancelled by someone else too, that cancellation propagates.
            if self._failure and self._task.uncancel() <= self._cancellations:
                raise ProviderFailure(self._failure) from None
            raise
        finally:
            self._waiting = False

    def stop(self) -> None:
        self._timer.cancel()


class ProviderStream:
    """A streaming answer: iterate over its bytes, and call ``note_data`` whenever they contained data."""

    def __init__(self, body: Body, watchdog: _Watchdog, *, by_responses: bool) -> None:
        self.by_responses = by_responses  #: Whether the provider was asked by the Responses API.
        self._body = body
        self._watchdog = watchdog
        self.note_data = watchdog.note_data  #: Restarts the idle time-out.
        self.http_status = body.status
        self.content_type = body.content_type
        self.provider_request_id = body.request_id
        self.rate_limits = body.rate_limits  #: What the provider says about its limits; None: nothing.

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data = await self._watchdog.wait_for(self._body.read())
        if not data:
            raise StopAsyncIteration
        return data


class Provider:
    """One configured provider and its connections. Created, used and closed on one event loop."""

    def __init__(self, config: ProviderConfig, tls: ssl.SSLContext) -> None:
        self.config = config
        self._transport = HttpTransport(
            tls=tls,
            proxy=config.proxy.get_secret_value() if config.proxy else None,
            max_connections=config.max_connections,
        )
        self._client = _sdk_client(config)
        self._heads: dict[str, Head] = {}  #: What the SDK puts before a body, by path.
        self._headers = _headers(config)
        self._key = key_of(config)
        self._secrets = [
            secret.get_secret_value()
            for secret in (config.proxy, *config.headers.values(), *config.query.values())
            if secret is not None
        ]
        self._deployment_per_model = config.kind == "azure" and config.deployment is None
        self._need_responses: set[str] = set()  #: Models that chat completions have refused to serve.
        self._refuse_encrypted: set[str] = set()  #: Models without reasoning that could be given back.
        self._refuse_usage: set[str] = set()  #: Models with which the provider refuses the option that asks for usage.
        self._draining: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def stream(self, request: dict[str, Any], timeouts: Timeouts) -> AsyncIterator[ProviderStream]:
        """Send ``request``, a chat-completions body, and yield the answer once the headers of a success are there.

        The connection is always released: for reuse if the answer was read to its end, by a reset if the block is
        left with an exception.

        Raises:
            ProviderFailure: on entering, if there is no response or the provider refuses the request; while
                iterating, if the answer breaks off or stalls.
        """
        watchdog = _Watchdog(timeouts)
        try:
            body, by_responses = await watchdog.wait_for(self._ask(request, timeouts, watchdog))
            watchdog.body = body
            try:
                yield ProviderStream(body, watchdog, by_responses=by_responses)
            except BaseException:
                body.close()
                raise
            self._release(body)
        finally:
            watchdog.stop()

    async def _ask(self, request: dict[str, Any], timeouts: Timeouts, watchdog: _Watchdog) -> tuple[Body, bool]:
        """Ask in the dialect that the model needs; return the answer, and whether that is the Responses API.

        What the model needs is learnt, where the configuration leaves it open, from its refusal to answer by chat
        completions; such a refusal costs no attempt.
        """
        model = request["model"]
        api = self.config.api_of(model) if self.config.kind == "openai" else "chat"
        needed = model in self._need_responses or (self.config.is_openai and only_by_responses(request))
        if api != "responses" and not (api == "auto" and needed):
            try:
                return await self._ask_by_chat(request, watchdog), False
            except ProviderFailure as error:
                if api != "auto" or not wants_responses(request, error.failure):
                    raise
        # A model that thinks unseen is silent for as long.
        watchdog.expect_first_data_within(timeouts.first_token_by_responses or timeouts.first_token)
        body = await self._ask_by_responses(request, watchdog)
        if api == "responses" or needed:
            return body, True
        self._remember(self._need_responses, model)
        log.info("dialect_learnt", provider=self.config.name, model=model, api="responses")
        return body, True

    async def _ask_by_chat(self, request: dict[str, Any], watchdog: _Watchdog) -> Body:
        """Ask for a chat completion; if the provider refuses the usage option, which we add, leave it out."""
        model = request["model"]
        ask_for_usage = self.config.stream_options and model not in self._refuse_usage
        try:
            return await self._post(_CHAT, model, _encode(request, ask_for_usage=ask_for_usage), watchdog)
        except ProviderFailure as error:
            ours = ask_for_usage and not request.get("stream_options")
            if not ours or not _refuses_usage_option(error):
                raise
        body = await self._post(_CHAT, model, _encode(request, ask_for_usage=False), watchdog)
        self._remember(self._refuse_usage, model)
        log.info("parameter_left_out", provider=self.config.name, model=model, parameter="stream_options")
        return body

    async def _ask_by_responses(self, request: dict[str, Any], watchdog: _Watchdog) -> Body:
        """Ask for a response; if the provider refuses what we add, or cannot read what it once gave us, without it."""
        model = request["model"]
        given = self.config.responses
        options = ResponsesOptions(
            pass_through=given.pass_through,
            instructions=given.instructions,
            reasoning_summary=given.reasoning_summary,
            encrypted_reasoning=given.encrypted_reasoning and model not in self._refuse_encrypted,
            item_ids=given.item_ids,
        )
        content = self._encode_response(request, options)
        try:
            return await self._post(_RESPONSES, model, content, watchdog)
        except ProviderFailure as error:
            if options.encrypted_reasoning and refuses_encrypted_reasoning(error.failure):
                self._remember(self._refuse_encrypted, model)
                log.info("parameter_left_out", provider=self.config.name, model=model, parameter="include")
                options = replace(options, encrypted_reasoning=False)
            elif refuses_returned_items(error.failure):
                log.info("items_left_out", provider=self.config.name, model=model)
                options = replace(options, return_items=False)
            else:
                raise _with_hint(error) from None
        return await self._post(_RESPONSES, model, self._encode_response(request, options), watchdog)

    def _encode_response(self, request: dict[str, Any], options: ResponsesOptions) -> bytes:
        try:
            return _as_json(encode_response(request, self.config.name, options))
        except NotExpressibleError as error:
            message = f"{request['model']!r} is asked by the Responses API, and {error}"
            raise ProviderFailure(Failure(code=ErrorCode.BAD_REQUEST, message=message)) from None

    @staticmethod
    def _remember(models: set[str], model: str) -> None:
        if len(models) < _MAX_MODELS:
            models.add(model)

    async def _post(self, path: str, model: str, content: bytes, watchdog: _Watchdog) -> Body:
        if self._deployment_per_model:  # the SDK reads the model only from bodies it encodes itself
            path = f"/deployments/{urllib.parse.quote(model, safe='')}{path}"
        with _only_provider_failures():
            head = self._heads.get(path)
            if head is None:
                head = await self._head(self._client.post, path)
                if len(self._heads) < _MAX_HEADS:
                    self._heads[path] = head
            return await self._send(head, content, watchdog.connect, watchdog.note_refusal)

    async def _head(self, method: Callable[..., Awaitable[Any]], path: str) -> Head:
        """Return what the SDK puts before a body, without a key."""
        response = await method(
            path,
            cast_to=httpx2.Response,
            stream=True,  # so that the response is handed out as it is
            stream_cls=openai.AsyncStream[Any],
            options={"headers": self._headers, "timeout": httpx2.Timeout(None), "security": _SECURITY},
        )
        return cast("Head", response.extensions["head"])

    async def _send(
        self, head: Head, content: bytes, connect_timeout: float, refused: Callable[[], None] | None = None
    ) -> Body:
        """Send a request with the key; if it is refused and there is another by now, send it again with that one."""
        key = await self._key.current()
        try:
            return await self._transport.send(self._with_key(head, key), content, connect_timeout, refused)
        except ProviderFailure as error:
            if error.failure.code is not ErrorCode.AUTH:
                raise
            other = await self._key.other_than(key)
            if other is None:
                raise
        return await self._transport.send(self._with_key(head, other), content, connect_timeout, refused)

    def _with_key(self, head: Head, key: str | None) -> Head:
        name = self.config.key_header
        if key is None or any(given.lower() == name for given in self.config.headers):
            return head
        return replace(head, headers=[*head.headers, (name, f"Bearer {key}" if name == "authorization" else key)])

    def _release(self, body: Body) -> None:
        """Read the rest of an answer in the background, so that its connection can be reused."""
        if body.complete:
            return
        task = asyncio.create_task(_drain(body))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def scrubbed(self, failure: Failure) -> Failure:
        """Return ``failure`` without any value of the configuration, however the provider came to quote it."""
        if failure.provider_error is None:
            return failure
        secrets = [*self._secrets, *self._key.known]
        return replace(failure, provider_error=words.without(failure.provider_error, secrets))

    async def check(self) -> ProviderCheck:
        """Check the provider free of charge: ask for its list of models."""
        try:
            await self._key.current()
        except ProviderFailure as error:
            line, _, advice = error.failure.message.partition("; ")
            return ProviderCheck(False, f"{self.config.url}: {line}", advice)
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                with _only_provider_failures():
                    head = await self._head(self._client.get, _MODELS)
                    text = await _read_up_to(await self._send(head, b"", _CHECK_SECONDS), _MODEL_LIST_BYTES)
        except TimeoutError:
            return ProviderCheck(False, f"{self.config.url} does not answer within {_CHECK_SECONDS:g} s")
        except ProviderFailure as error:
            if error.failure.code is ErrorCode.NOT_FOUND:
                return ProviderCheck(True, f"{self.config.url} answers, but lists no models (HTTP 404)")
            source = f" of its {self._key.origin}" if error.failure.code is ErrorCode.AUTH and self._key.origin else ""
            return ProviderCheck(False, f"{self.config.url}: {error.failure.message}{source}")
        try:
            count = len(orjson.loads(text)["data"])
        except (ValueError, KeyError, TypeError):
            return ProviderCheck(False, f"{self.config.url} answers, but not like an OpenAI-compatible provider")
        source = f"; its key is that of {self._key.origin}" if self._key.origin else ""
        return ProviderCheck(True, f"{self.config.url} answers and lists {count} model{'s' * (count != 1)}{source}")

    async def aclose(self) -> None:
        """Close every connection."""
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        await self._key.aclose()
        await self._transport.aclose()
        await self._client.close()


class Providers:
    """The configured providers, by name. Created, used and closed on one event loop."""

    def __init__(self, configs: Mapping[str, ProviderConfig]) -> None:
        tls = httpx2.create_ssl_context()
        self._providers = {name: Provider(config, tls) for name, config in configs.items()}

    def get(self, name: str) -> Provider:
        """Return the provider called ``name``.

        Raises:
            ProviderFailure: there is no such provider; the message lists those that exist.
        """
        if (provider := self._providers.get(name)) is None:
            message = f"no provider {name!r} is configured; there is: {', '.join(sorted(self._providers))}"
            raise ProviderFailure(Failure(code=ErrorCode.UNKNOWN_PROVIDER, message=message))
        return provider

    async def aclose(self) -> None:
        """Close every connection to every provider."""
        for provider in self._providers.values():
            await provider.aclose()


def _encode(request: dict[str, Any], *, ask_for_usage: bool) -> bytes:
    """Return the body to send: the request, as a stream.

    With ``ask_for_usage`` the provider is asked to report usage, unless the request's ``stream_options`` say otherwise.

    Raises:
        ProviderFailure: the request cannot be written as JSON.
    """
    body = request | {"stream": True}
    options = request.get("stream_options") or {}
    if ask_for_usage and isinstance(options, dict):
        body["stream_options"] = {"include_usage": True, **options}
    messages = request.get("messages")
    if isinstance(messages, list) and any(isinstance(message, dict) and ITEMS_FIELD in message for message in messages):
        # What an answer of the Responses API is given back by; strict servers refuse what they do not know.
        body["messages"] = [
            {name: value for name, value in message.items() if name != ITEMS_FIELD}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return _as_json(body)


def _as_json(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        # Lone surrogates, integers beyond 64 bits and deep nesting are JSON all the same.
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    raise ProviderFailure(Failure(code=ErrorCode.INVALID_JOB, message="the request cannot be written as JSON"))


def _refuses_usage_option(error: ProviderFailure) -> bool:
    """Return whether the provider may have refused a request because of the option that asks for usage."""
    refused = error.failure.http_status in _REFUSED_REQUEST
    return refused and any(name in error.body for name in (b"stream_options", b"include_usage"))


def _with_hint(error: ProviderFailure) -> ProviderFailure:
    """Say what to do where a server has no such endpoint; a 404 that names the model is about the model."""
    failure = error.failure
    said = failure.provider_error
    about_model = said is not None and any("model" in (text or "") for text in (said.code, said.param, said.message))
    if failure.http_status not in _NO_ENDPOINT or about_model:
        return error
    hint = f'{failure.message}; it seems to have no {_RESPONSES}: set api = "chat" for this provider or model'
    return ProviderFailure(replace(failure, message=hint))


def _sdk_client(config: ProviderConfig) -> openai.AsyncOpenAI:
    """Return the SDK's client, which builds requests, but knows no key and sends nothing."""
    shared: dict[str, Any] = {
        "api_key": "none",
        "max_retries": 0,
        "default_query": {name: value.get_secret_value() for name, value in config.query.items()},
        "http_client": httpx2.AsyncClient(
            transport=HeadRecorder(), trust_env=False, cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        ),
    }
    client: openai.AsyncOpenAI
    if config.kind == "azure":
        client = openai.AsyncAzureOpenAI(
            azure_endpoint=config.endpoint or "",
            azure_deployment=config.deployment,
            api_version=config.api_version,
            **shared,
        )
    else:
        client = openai.AsyncOpenAI(base_url=config.base_url, **shared)
    # The SDK reads OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS whoever the provider is. What is sent to
    # whom is for our configuration to decide.
    client.organization = client.project = None
    client._custom_headers = {}  # noqa: SLF001  # there is no public way
    return client


def _headers(config: ProviderConfig) -> dict[str, str | openai.Omit]:
    given = {name: value.get_secret_value() for name, value in config.headers.items()}
    # The key comes with each request, so the SDK is told to leave it out.
    no_key = {name: openai.omit for name in ("authorization", "api-key") if name not in map(str.lower, given)}
    # Compressing proxies hold small events back until a block is full, and decompressing costs time.
    return {"Accept-Encoding": "identity", **given, **no_key}


@contextlib.contextmanager
def _only_provider_failures() -> Iterator[None]:
    """Turn any exception other than ``ProviderFailure`` into one: its message may quote a header."""
    try:
        yield
    except ProviderFailure:
        raise
    except Exception as error:  # noqa: BLE001  # a library's errors end here
        message = f"unexpected {type(error).__name__} while the request was made"
        raise ProviderFailure(Failure(code=ErrorCode.INTERNAL, message=message)) from None


async def _drain(body: Body) -> None:
    try:
        with contextlib.suppress(ProviderFailure, TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await body.read():
                    pass
    finally:
        body.close()


async def _read_up_to(body: Body, limit: int) -> bytes:
    parts: list[bytes] = []
    try:
        while sum(map(len, parts)) < limit and (data := await body.read()):
            parts.append(data)
    finally:
        body.close()
    return b"".join(parts)
