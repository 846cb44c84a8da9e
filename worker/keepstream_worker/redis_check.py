"""The check of a Redis: every link to it is tried as it will be used, and what waiting does not mend is named.

In: a ``RedisServer``, from the start of a worker and from `keepstream doctor`.
Out: facts about the server; or a ``RedisFault`` that says what is wrong and what to do.  No secret is in either.
"""

import asyncio
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import redis
import redis.asyncio
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError

from keepstream import names
from keepstream.client.redis_connections import PoolOptions, make_async_pool, make_pool, sentinel_clients
from keepstream.client.redis_url import RedisServer, Sentinels
from keepstream.errors import InvalidSettingError
from keepstream_worker.events.redis_link import RedisLink, pack
from keepstream_worker.telemetry.outages import PASSING_REASONS, REDIS_REASONS, redis_reason

#: Seconds; a server that needs longer to answer at all is no use for live events.
_TIMEOUT: Final = 3.0
_OPTIONS: Final = PoolOptions(connect_timeout=_TIMEOUT, answer_timeout=_TIMEOUT)
#: OpenSSL's numbers for a certificate that is valid, but for another host name or address.
_WRONG_NAME: Final = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """A Redis that can be used."""

    version: str  #: ``Redis 7.2.4`` for instance; "Redis" if its user may not ask.
    eviction: str | None = None  #: Its maxmemory-policy; None: its user may not ask.
    silent_sentinels: int = 0  #: How many of its Sentinels did not answer.


class RedisFault(Exception):  # noqa: N818  # a finding, as the doctor's others
    """A Redis that cannot be used.

    Args:
        found: What is wrong, as half a sentence about Redis.
        advice: What to do.
        away: Whether it just did not answer.
        passes: Whether it answered with an error that may pass by itself, or be mended while one waits.
    """

    def __init__(self, found: str, advice: str, *, away: bool = False, passes: bool = False) -> None:
        super().__init__(found)
        self.found = found
        self.advice = advice
        self.away = away
        self.passes = passes


def check_redis_server(server: RedisServer, variable: str) -> RedisFacts:
    """Try every link to ``server``, which the environment variable ``variable`` names, and return what it is.

    Raises:
        RedisFault: one of them does not work.
    """
    silent = 0
    try:
        if isinstance(server.place, Sentinels):
            silent = _ask_sentinels(server, server.place.service, variable)
        with redis.Redis.from_pool(make_pool(server, **_OPTIONS)) as client:
            client.ping()
            facts = _examine(client, variable)
        asyncio.run(_try_async_links(server))
    except InvalidSettingError as error:
        raise RedisFault(f"cannot be asked: {error}", f"correct {variable}") from None
    except (RedisError, OSError) as error:
        raise _fault(error, server, variable) from None
    return replace(facts, silent_sentinels=silent)


async def _try_async_links(server: RedisServer) -> None:
    async with redis.asyncio.Redis.from_pool(make_async_pool(server, **_OPTIONS)) as client:
        await client.ping()
    link = await RedisLink.connect(server, _TIMEOUT)
    try:
        async with asyncio.timeout(_TIMEOUT):
            (answer,) = await link.call([pack("PING")], 1)
    finally:
        link.close()
    if isinstance(answer, Exception):
        raise ResponseError(str(answer))


def _ask_sentinels(server: RedisServer, service: str, variable: str) -> int:
    """Find out what the Sentinels know, whose refusals redis-py takes for silence; return how many are silent."""
    known: set[str] = set()
    faults = []
    for client in sentinel_clients(server):
        try:
            with client:
                masters: Any = client.sentinel_masters()
                known |= masters.keys()
        except (RedisError, OSError) as error:
            faults.append(_fault(error, server, variable))
    fault = next((fault for fault in faults if not fault.away), None)
    if fault is not None or (not known and faults):
        fault = fault or faults[0]
        raise RedisFault(f"is to be found by a Sentinel, which {fault.found}", fault.advice, away=fault.away)
    if service not in known:
        guess = names.nearest(service, known)
        advice = f"did you mean {guess}?" if guess else f"they know {', '.join(sorted(known)) or 'none'}"
        raise RedisFault(f"is not known to its Sentinels by the service's name in {variable}", advice)
    return len(faults)


def _examine(client: redis.Redis, variable: str) -> RedisFacts:
    try:
        facts: dict[str, Any] = client.info()
    except NoPermissionError:
        return RedisFacts("Redis")
    if facts.get("cluster_enabled"):
        raise RedisFault(
            "is a node of a Redis Cluster, from which Celery cannot take a queue",
            f"set {variable} to a single Redis, or to Sentinels",
        )
    if facts.get("role") == "slave":
        # It may be about to become the master, or the address to lead to another.
        raise RedisFault(
            "is a replica, which takes no jobs and no events", f"set {variable} to its master", passes=True
        )
    name = "Valkey" if "valkey_version" in facts else "Redis"
    version = facts.get("valkey_version") or facts.get("redis_version")
    return RedisFacts(f"{name} {version}", str(facts.get("maxmemory_policy", "noeviction")))


def _fault(error: BaseException, server: RedisServer, variable: str) -> RedisFault:
    """Return what an error means; its text may quote the URL, so only words of ours and of OpenSSL are repeated."""
    word = redis_reason(error)
    if word in PASSING_REASONS:
        return RedisFault(f"answers with an error ({word})", REDIS_REASONS[word] or "see its own log", passes=True)
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError(verify_code=code) if code in _WRONG_NAME:
                return RedisFault(
                    "shows a certificate for another host",
                    f"write the host in {variable} as the certificate names it; Sentinels name hosts as they were"
                    " announced to them",
                )
            case ssl.SSLCertVerificationError():
                return RedisFault(
                    f"shows a certificate that is not trusted ({cause.verify_message})",
                    f"name its authority in {variable}: ?ssl_ca_certs=/path/ca.pem",
                )
            case ssl.SSLError():
                return RedisFault(
                    f"does not agree on TLS ({cause.reason or 'no reason given'})",
                    "see whether it speaks TLS at this port and wants a certificate: ssl_certfile and ssl_keyfile in"
                    f" {variable}",
                )
            case AuthenticationError() | AuthorizationError():
                return RedisFault(
                    "refuses the user or password", f"correct those in {variable}, or KEEPSTREAM_REDIS_PASSWORD"
                )
            case NoPermissionError():
                return RedisFault("does not let this user in", "compare its ACL with docs/operations/running.md")
            case ResponseError() if "DB index" in str(cause) or "invalid DB" in str(cause):
                return RedisFault("has no database of this number", f"correct the number in {variable}")
            case ResponseError():
                return RedisFault(f"answers with an error ({type(cause).__name__})", "see its own log")
    *_, root = _causes(error)
    if isinstance(
        root, redis.ConnectionError | ConnectionResetError | BrokenPipeError
    ):  # redis-py met the stream's end
        advice = (
            f"see whether it wants a certificate: ssl_certfile and ssl_keyfile in {variable}"
            if server.tls
            else f"see its own log; if it speaks TLS, {variable} has to begin with rediss://"
        )
        return RedisFault("closes the connection", advice)
    silent_on_tls = server.tls and not isinstance(root, ConnectionRefusedError)
    advice = f"start it, or set {variable} to where it is{' and speaks TLS' if silent_on_tls else ''}"
    return RedisFault(f"does not answer ({type(root).__name__})", advice, away=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and what it came from; redis-py wraps what the socket and TLS raise."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):  # not the cancellation of which a time-out was made
        yield cause
        cause = cause.__cause__ or cause.__context__
