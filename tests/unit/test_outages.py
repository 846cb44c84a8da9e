"""An outage is said once for each reason, and once when it is over; the reason is the server's word, never its text."""

import asyncio

import pytest
import redis
import structlog
from redis._parsers import _RESP2Parser
from redis.exceptions import RedisError

from keepstream_worker.telemetry.outages import REDIS_REASONS, Outage, Server, redis_reason


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_reason_is_said_once_and_the_end_with_its_length() -> None:
    clock = Clock()
    outage = Outage(Server.BROKER, "take messages", clock)
    with structlog.testing.capture_logs() as said:
        outage.worked()
        for reason in ("UNBLOCKED", "READONLY", "READONLY", "UNBLOCKED"):
            outage.failed(reason, REDIS_REASONS[reason])
            clock.now += 1
        outage.worked()
        outage.worked()
    assert [(line["event"], line.get("reason"), line.get("lasted")) for line in said] == [
        ("broker_unavailable", "UNBLOCKED", None),
        ("broker_unavailable", "READONLY", None),
        ("broker_available", None, 4.0),
    ]
    assert "advice" not in said[0]
    assert "master" in said[1]["advice"]


def test_a_second_outage_is_said_again() -> None:
    outage = Outage(Server.DATABASE, "read and write")
    with structlog.testing.capture_logs() as said:
        for _ in range(2):
            outage.failed("it is away")
            outage.worked()
    assert [line["event"] for line in said] == ["database_unavailable", "database_available"] * 2


def answer(text: str) -> RedisError:
    """Return what redis-py makes of an error answer."""
    error: RedisError = _RESP2Parser.parse_error(text)
    return error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)", "UNBLOCKED"),
        ("READONLY You can't write against a read only replica.", "READONLY"),
        ("LOADING Redis is loading the dataset in memory", "LOADING"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "MASTERDOWN"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("EXECABORT Transaction discarded because of: OOM command not allowed", "OOM"),
        ("ERR Error running script (call to f_1): @user_script:14: -READONLY You can't write", "READONLY"),
        ("NOAUTH Authentication required.", "NOAUTH"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "WRONGPASS"),
        ("NOPERM User worker has no permissions to run the 'blmpop' command", "NOPERM"),
        ("ERR max number of clients reached", "MAXCLIENTS"),
        ("ERR unknown command 'BLMPOP', with args beginning with: 'a secret'", "ResponseError"),
    ],
)
def test_reason_is_the_word_of_redis(text: str, reason: str) -> None:
    assert redis_reason(answer(text)) == reason


def test_reason_of_a_lost_connection_is_its_cause() -> None:
    def connect() -> None:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise redis.ConnectionError("Error 111 connecting to redis://:secret@host") from error

    with pytest.raises(RedisError) as caught:
        connect()
    assert redis_reason(caught.value) == "ConnectionRefusedError"


@pytest.mark.parametrize("meanwhile", [SystemExit, asyncio.CancelledError])
def test_what_was_under_way_meanwhile_is_no_reason(meanwhile: type[BaseException]) -> None:
    error = TimeoutError()
    error.__context__ = meanwhile()
    assert redis_reason(error) == "TimeoutError"


def test_every_word_of_redis_is_recognised() -> None:
    words = {word for word in REDIS_REASONS if word.isupper()} - {"MAXCLIENTS"}
    assert {redis_reason(answer(f"{word} 1 host:1")) for word in words} == words
