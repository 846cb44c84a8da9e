"""A job is checked in the producer's process, and means the same in the worker's."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from keepstream.errors import InvalidJobError
from keepstream.jobs import MAX_JOB_BYTES, RESERVED_PARAMETERS, Job, parse_job

MESSAGES = [{"role": "user", "content": "Hello"}]


def job(**fields: Any) -> Job:
    return parse_job({"model": "m", "messages": MESSAGES, **fields})


def test_unnamed_fields_are_chat_completions_parameters() -> None:
    assert job(temperature=0.5, tools=[{"type": "function"}], x_vendor={"a": [1]}).parameters == {
        "temperature": 0.5,
        "tools": [{"type": "function"}],
        "x_vendor": {"a": [1]},
    }


def test_a_job_survives_the_wire() -> None:
    before = job(
        tenant="acme",
        metadata={"a": None},
        max_attempts=3,
        idle_timeout=1.5,
        expires_at="2030-01-01T00:00:00+02:00",
        stop=["\ud800", "\x00"],
    )
    after = parse_job(json.loads(before.to_json()))
    assert after == before
    assert after.request_hash() == before.request_hash()


def test_a_job_on_the_wire_always_names_its_id_and_tenant() -> None:
    assert {"id", "tenant", "model", "messages"} == job().to_wire().keys()


def test_python_values_hash_like_the_json_they_become() -> None:
    before = job(stop=("a", "b"), seed_day=datetime(2026, 1, 1, tzinfo=UTC))
    assert parse_job(json.loads(before.to_json())).request_hash() == before.request_hash()


def test_times_are_kept_in_utc() -> None:
    assert job(expires_at="2030-01-01T00:00:00+02:00").expires_at == datetime(2029, 12, 31, 22, tzinfo=UTC)


def test_the_same_idempotency_key_gives_the_same_id() -> None:
    assert job(idempotency_key="k").id == job(idempotency_key="k", temperature=1).id
    assert job(idempotency_key="k").id != job(idempotency_key="l").id


def test_tenants_do_not_share_idempotency_keys() -> None:
    assert job(idempotency_key="k", tenant="a").id != job(idempotency_key="k", tenant="b").id


def test_an_id_given_by_the_caller_is_kept() -> None:
    assert job(id="mine", idempotency_key="k").id == "mine"


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"messages": [{"role": "user", "content": "Bye"}]}, {"provider": "p"}, {"top_p": 1}]
)
def test_the_hash_tells_different_requests_apart(change: dict[str, Any]) -> None:
    assert job(**change).request_hash() != job().request_hash()


@pytest.mark.parametrize(
    "change",
    [{"metadata": {"a": 1}}, {"max_attempts": 2}, {"total_timeout": 9}, {"expires_at": "2030-01-01T00:00:00Z"}],
)
def test_the_hash_leaves_out_what_a_repetition_may_change(change: dict[str, Any]) -> None:
    assert job(**change).request_hash() == job().request_hash()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": ""}, "model"),
        ({"model": "a\x00b"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"tenant": "a:b"}, "tenant"),
        ({"id": "a}b"}, "id"),
        ({"id": "a\n"}, "id"),
        ({"provider": "https://example.org"}, "provider"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"idle_timeout": 0}, "idle_timeout"),
        ({"idle_timeout": float("nan")}, "idle_timeout"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"idempotency_key": ""}, "idempotency_key"),
        *(({name: "x"}, name) for name in sorted(RESERVED_PARAMETERS)),
    ],
)
def test_an_error_names_the_wrong_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidJobError, match=named):
        job(**fields)


def test_an_error_does_not_repeat_the_value() -> None:
    with pytest.raises(InvalidJobError) as caught:
        parse_job({"model": 5, "messages": "my secret prompt", "tenant": "my secret tenant"})
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("data", [None, [], "job", b"{}", 1])
def test_only_an_object_can_be_a_job(data: object) -> None:
    with pytest.raises(InvalidJobError, match="JSON object"):
        parse_job(data)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], object(), {"a": {1, 2, object()}}])
def test_what_json_cannot_express_is_refused(value: object) -> None:
    with pytest.raises(InvalidJobError, match="JSON cannot express"):
        job(x=value).to_json()


def test_a_job_nested_too_deeply_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidJobError):
        job(x=nested).to_json()


def test_the_size_of_a_job_is_bounded() -> None:
    with pytest.raises(InvalidJobError, match="bytes as JSON"):
        job(x="x" * MAX_JOB_BYTES).to_json()
