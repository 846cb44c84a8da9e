"""A job is checked in the producer's process, and means the same in the worker's."""

import json
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from keepstream.errors import InvalidJobError
from keepstream.jobs import (
    MAX_JOB_BYTES,
    MAX_METADATA_BYTES,
    NOT_IN_A_REQUEST,
    RESERVED_FIELDS,
    Fallback,
    Job,
    JobRef,
    make_job,
    parse_job,
    parse_message,
)

MESSAGES = [{"role": "user", "content": "Hello"}]
REQUEST: dict[str, Any] = {"model": "m", "messages": MESSAGES}
TARGET = {"provider": "q", "model": "n"}


def job(request: Any = None, **fields: Any) -> Job:
    return parse_job({"v": 2, "request": REQUEST if request is None else request, **fields})


def with_parameters(**parameters: Any) -> Job:
    return job(REQUEST | parameters)


def refusal(data: object) -> str:
    """Return why a job is refused, which is one line without a cause."""
    with pytest.raises(InvalidJobError) as caught:
        parse_job(data).to_json()
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reads(text: str) -> Job:
    return parse_job(json.loads(text))


# -- the request is the caller's --


def test_a_request_is_kept_as_it_is() -> None:
    request = REQUEST | {
        "temperature": 0.5,
        "metadata": {"id": 5, "v": None},
        "provider": {"order": ["a"]},
        "user": None,
        "max_attempts": "theirs",
        "x-Vendor 水": {"a": [1, {"b": []}]},
    }
    assert job(request).request == request
    assert job(request).to_wire()["request"] == request


def test_a_job_does_not_change_with_the_values_it_was_made_of() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    request = {"model": "m", "messages": messages}
    made = job(request)
    messages[0]["role"] = "system"
    messages.append({})
    request["model"] = "n"
    assert (made.model, made.messages) == ("m", MESSAGES)


@pytest.mark.parametrize("name", sorted(NOT_IN_A_REQUEST))
def test_what_the_worker_sets_and_the_arguments_of_the_sdk_are_no_part_of_a_request(name: str) -> None:
    refused = f"'{name}' {NOT_IN_A_REQUEST[name]}"
    assert refusal({"v": 2, "request": REQUEST | {name: "x"}}) == f"request: {refused}"
    assert refusal({"v": 2, "request": REQUEST, name: "x"}) == refused


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (None, "request: must be an object"),
        ([], "request: must be an object"),
        ({}, "request: 'model' is missing"),
        ({"modle": "m", "messages": MESSAGES}, "request: 'model' is missing; is 'modle' a typo?"),
        ({"model": "m", "mesages": MESSAGES}, "request: 'messages' is missing; is 'mesages' a typo?"),
        (REQUEST | {"model": ""}, "request: 'model' must be a text"),
        (REQUEST | {"model": 5}, "request: 'model' must be a text"),
        (REQUEST | {"model": "a\x00b"}, "request: 'model' must be a text"),
        (REQUEST | {"model": "a\n"}, "request: 'model' must be a text"),
        (REQUEST | {"model": "\ud800"}, "request: 'model' must be a text"),
        (REQUEST | {"model": "m" * 257}, "request: 'model' must be a text"),
        (REQUEST | {"messages": []}, "request: 'messages' must be a list"),
        (REQUEST | {"messages": "Hello"}, "request: 'messages' must be a list"),
        (REQUEST | {"messages": ["Hello"]}, "request: 'messages' must hold objects only"),
        (REQUEST | {5: 1}, "request: names must be texts"),
    ],
)
def test_a_request_needs_a_model_and_messages(request_: Any, said: str) -> None:
    assert refusal({"v": 2, "request": request_}).startswith(said)


@pytest.mark.parametrize(("others", "hint"), [(99, "; is 'modle' a typo?"), (100, "")])
def test_a_typo_is_looked_for_in_the_first_names_of_a_request_only(others: int, hint: str) -> None:
    request = {f"other_{number}": 0 for number in range(others)} | {"modle": "m"}
    assert refusal({"v": 2, "request": request}) == f"request: 'model' is missing{hint}"


NAMES = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES | st.sampled_from([*Job.model_fields, *RESERVED_FIELDS]), JSON, max_size=5))
def test_any_parameters_arrive_as_they_were_given(parameters: dict[str, Any]) -> None:
    before = job(parameters | REQUEST)
    after = reads(before.to_json())
    # As JSON text, in which true is not 1 and -0.0 is not 0.
    assert json.dumps(after.request, sort_keys=True) == json.dumps(parameters | REQUEST, sort_keys=True)
    assert after.request_hash() == before.request_hash()


@given(
    st.dictionaries(st.sampled_from([*Job.model_fields, "n", "class"]), JSON, max_size=5),
    st.dictionaries(st.sampled_from(["model", "messages", "stream", "n"]), JSON) | JSON,
)
def test_whatever_is_no_job_is_refused_as_an_invalid_job(fields: dict[str, Any], request_: Any) -> None:
    for data in (fields, {"v": 2, "request": REQUEST} | fields, {"v": 2, "request": request_}):
        try:
            parse_job(data).to_json()
        except InvalidJobError as error:
            assert "\n" not in str(error)  # noqa: PT017  # a job by chance is as good


# -- the envelope is ours --


@pytest.mark.parametrize("version", [None, 1, 3, "2", 2.0, True, [2]])
def test_a_job_of_another_version_is_refused(version: object) -> None:
    assert refusal({"v": version, "request": REQUEST}).startswith("v: this library knows version 2")


def test_a_job_without_a_version_is_told_what_to_write() -> None:
    assert refusal({"request": REQUEST}) == 'v: a job says the version of its format: add "v": 2'
    assert "put 'model', 'messages' and all further parameters in 'request'" in refusal(REQUEST)


@pytest.mark.parametrize("name", sorted(RESERVED_FIELDS))
def test_names_of_later_versions_are_refused_and_not_ignored(name: str) -> None:
    assert refusal({"v": 2, "request": REQUEST, name: None}) == f"'{name}' is not supported by this version"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_attempt", "did you mean 'max_attempts'?"),
        ("Metadata", "did you mean 'metadata'?"),
        ("idempotencyKey", "did you mean 'idempotency_key'?"),
        ("expire_at", "did you mean 'expires_at'?"),
        ("reqest", "did you mean 'request'?"),
        ("temprature", "if it is a parameter of the model's API, put it in 'request'"),
        ("max_tokens", "if it is a parameter of the model's API, put it in 'request'"),
        ("model", "'model' belongs in 'request'"),
        ("messages", "'messages' belongs in 'request'"),
    ],
)
def test_an_unknown_field_is_refused_with_what_may_be_meant(name: str, hint: str) -> None:
    assert refusal({"v": 2, "request": REQUEST, name: 1}).endswith(hint)
    with pytest.raises(ValidationError, match=name):
        Job.model_validate({"request": REQUEST, name: 1})


@pytest.mark.parametrize("name", ["my secret prompt", "secret\nprompt", "secret" * 20, 5, None, ("secret",)])
def test_a_name_that_may_be_a_text_in_the_wrong_place_is_not_repeated(name: Any) -> None:
    assert "secret" not in refusal({"v": 2, "request": REQUEST, name: 1})
    assert "secret" not in refusal({"v": 2, "request": REQUEST | {name: float("nan"), "an innocent name": 1}})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("id", [None, "", 5, "a}b", "a\n", "\ud800", "x" * 129]),
        ("tenant", [None, "a:b", 5]),
        ("provider", [None, "https://example.org", {"order": ["a"]}]),
        ("metadata", [None, [], "x", {5: 1}, {"a": float("nan")}, {"a": object()}, {"a": 10**5000}]),
        ("idempotency_key", ["", 5, "x" * 257, "\ud800"]),
        ("max_attempts", [0, 101, 10**400, True, 3.5, "3", float("nan"), float("inf")]),
        ("first_token_timeout", [0, -1, 86_401, 10**400, True, "3", float("nan"), float("inf"), [1]]),
        ("idle_timeout", [0, True, "3", float("nan")]),
        ("class", [None, "", "Bulk", "batch", 1, ["bulk"]]),
        ("fallbacks", [None, "q", {}, [None], [{}], [{"provider": "q"}], [{"model": "n"}], [TARGET | {"url": "x"}]]),
        ("fallbacks", [[TARGET | {"provider": "a b"}], [TARGET | {"model": ""}], [TARGET | {"model": 5}]]),
        ("fallbacks", [[TARGET | {"model": "a\x00b"}], [TARGET | {"model": "m" * 257}]]),
        ("total_timeout", [0, False, "3", float("-inf")]),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field: str, values: list[object]) -> None:
    for value in values:
        assert refusal({"v": 2, "request": REQUEST, field: value}).startswith(f"{field}: ")


# -- targets and class --


def test_a_job_has_a_class_and_further_targets() -> None:
    targets = [{"provider": "q", "model": "n"}, {"provider": "default", "model": "n"}]
    before = job(**{"class": "bulk"}, fallbacks=targets)
    assert (before.job_class, before.fallbacks) == ("bulk", tuple(Fallback(**target) for target in targets))
    assert before.chain == (("default", "m"), ("q", "n"), ("default", "n"))
    wire = before.to_wire()
    assert (wire["class"], wire["fallbacks"], "job_class" in wire) == ("bulk", targets, False)
    assert reads(before.to_json()) == before
    assert (job().job_class, job().fallbacks, job().chain) == ("interactive", (), (("default", "m"),))


def test_the_class_is_a_keyword_of_its_own_in_python_and_nowhere_else() -> None:
    assert make_job({"request": REQUEST, "job_class": "bulk"}).job_class == "bulk"
    assert Job(request=REQUEST, job_class="bulk").job_class == "bulk"
    assert refusal({"v": 2, "request": REQUEST, "job_class": "bulk"}).endswith("did you mean 'class'?")


@pytest.mark.parametrize(
    "targets",
    [
        [{"provider": "default", "model": "m"}],
        [TARGET, TARGET],
        [TARGET, {"provider": "q", "model": "o"}, TARGET],
    ],
)
def test_a_target_is_named_once(targets: list[dict[str, str]]) -> None:
    said = "fallbacks: each must be another provider or model than the job's own and the others"
    assert refusal({"v": 2, "request": REQUEST, "fallbacks": targets}) == said


def test_there_are_eight_fallbacks_at_most() -> None:
    targets = [TARGET | {"model": f"n{number}"} for number in range(9)]
    assert len(job(fallbacks=targets[:8]).chain) == 9
    assert refusal({"v": 2, "request": REQUEST, "fallbacks": targets}) == "fallbacks: at most 8 are accepted"


def test_what_is_wrong_with_a_fallback_is_said_without_its_values() -> None:
    wrong = [{"provider": "q"}, TARGET | {"secret": "x"}, TARGET | {"model": "secret\x00"}]
    refused = refusal({"v": 2, "request": REQUEST, "fallbacks": wrong})
    assert "fallbacks: 'model' is missing" in refused
    assert "a 'provider' and a 'model', and nothing else" in refused
    assert "secret" not in refused


# -- messages that name a stored job --


def test_a_message_may_carry_the_name_of_a_stored_job_alone() -> None:
    named = JobRef(tenant="acme", id="a-1")
    assert named.to_wire() == {"v": 2, "id": "a-1", "tenant": "acme"}
    assert parse_message(named.to_wire()) == named
    assert parse_message({"v": 2, "id": "a-1"}) == JobRef(tenant="default", id="a-1")


def test_a_message_may_carry_a_job() -> None:
    made = job(id="a-1", tenant="acme")
    assert parse_message(made.to_wire()) == made


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"v": 2}, "request: is missing"),
        ({"v": 2, "tenant": "acme"}, "request: is missing"),
        ({"v": 2, "id": "a-1", "metadata": {}}, "request: is missing"),
        ({"v": 2, "id": "a b"}, "id: must be 1 to 128 letters"),
        ({"v": 2, "id": "a-1", "tenant": None}, "tenant: "),
        ({"v": 3, "id": "a-1"}, "v: this library knows version 2"),
        ({"id": "a-1"}, "v: a job says the version"),
        (["a-1"], "a job is a JSON object"),
    ],
)
def test_a_message_that_is_neither_is_refused(message: object, said: str) -> None:
    with pytest.raises(InvalidJobError, match=f"^{said}") as caught:
        parse_message(message)
    assert caught.value.__cause__ is None


# -- times --


@pytest.mark.parametrize(
    "value",
    [
        *("2030-01-01T00:00:00", "2030-01-01", "2030-13-01T00:00:00Z", "2030-01-01T00:00:00+99:99", "soon", ""),
        *(5, "1893456000", 1.5, True, float("nan"), 10**400, [], datetime(2030, 1, 1), date(2030, 1, 1)),  # noqa: DTZ001
    ],
)
def test_a_time_needs_its_offset(value: object) -> None:
    assert refusal({"v": 2, "request": REQUEST, "expires_at": value}).startswith("expires_at: must be a time with its")


@pytest.mark.parametrize(
    "value",
    [
        "9999-12-31T23:59:59-01:00",
        "9999-01-01T00:00:00Z",
        "1969-12-31T23:59:59Z",
        "0001-01-01T00:00:00+14:00",
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
    ],
)
def test_a_time_that_is_far_out_of_range_is_refused(value: object) -> None:
    assert refusal({"v": 2, "request": REQUEST, "expires_at": value}) == "expires_at: must be a time from 1970 to 9998"


def test_times_are_kept_in_utc() -> None:
    expected = datetime(2029, 12, 31, 22, tzinfo=UTC)
    for value in (
        "2030-01-01T00:00:00+02:00",
        "2029-12-31t22:00:00z",
        expected.astimezone(timezone(timedelta(hours=9))),
    ):
        assert job(expires_at=value).expires_at == expected


@pytest.mark.parametrize("field", ["id", "tenant", "provider"])
def test_an_identifier_says_what_it_may_consist_of(field: str) -> None:
    assert "must be 1 to 128 letters, digits" in refusal({"v": 2, "request": REQUEST, field: "a b"})


def test_several_wrong_fields_are_named_at_once() -> None:
    refused = refusal({"v": 2, "request": {}, "tenant": "my secret tenant", "max_attempts": "my secret", "id": []})
    assert all(f"{field}: " in refused for field in ("request", "tenant", "max_attempts", "id"))
    assert "secret" not in refused


def test_an_error_does_not_repeat_the_value() -> None:
    request = {"model": 5, "messages": "my secret prompt"}
    assert "secret" not in refusal({"v": 2, "request": request, "tenant": "my secret tenant"})
    with pytest.raises(ValidationError) as caught:
        Job(request=request, tenant="my secret tenant")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "job", b"{}", 1])
def test_only_an_object_can_be_a_job(data: object) -> None:
    assert "JSON object" in refusal(data)


# -- the wire --


def test_a_job_survives_the_wire() -> None:
    before = job(
        REQUEST | {"stop": ["\ud800", "\x00"], "seed": 10**30, "tiny": -0.0, "x": [None, True, {}]},
        tenant="acme",
        metadata={"a": None},
        max_attempts=3,
        idle_timeout=1.5,
        expires_at="2030-01-01T00:00:00+02:00",
    )
    after = reads(before.to_json())
    assert after == before
    assert after.request_hash() == before.request_hash()


def test_a_job_on_the_wire_says_its_version_id_and_tenant_and_nothing_that_is_at_its_default() -> None:
    assert job(id="a").to_wire() == {"v": 2, "id": "a", "tenant": "default", "request": REQUEST}


def test_python_values_hash_like_the_json_they_become() -> None:
    before = with_parameters(stop=("a", "b"), seed_day=datetime(2026, 1, 1, tzinfo=UTC))
    assert reads(before.to_json()).request_hash() == before.request_hash()


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], object(), {"a": {1, 2, object()}}, [10**5000]])
def test_what_json_cannot_express_is_refused_by_its_name(value: object) -> None:
    assert refusal({"v": 2, "request": REQUEST | {"x": value}}) == "request.x: a value in it cannot be written as JSON"


def test_a_job_nested_too_deeply_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert refusal({"v": 2, "request": REQUEST | {"x": nested}})


def test_the_size_of_a_job_is_bounded() -> None:
    assert "bytes as JSON" in refusal({"v": 2, "request": REQUEST | {"x": "x" * MAX_JOB_BYTES}})


def test_the_size_of_metadata_is_bounded() -> None:
    """Listings read those of thousands of jobs at once."""
    job(REQUEST | {"x": "x" * MAX_METADATA_BYTES}, metadata={"x": "x" * (MAX_METADATA_BYTES - 20)}).to_json()
    refused = refusal({"v": 2, "request": REQUEST, "metadata": {"x": "x" * MAX_METADATA_BYTES}})
    assert refused.startswith("metadata: has 65545 bytes as JSON")


# -- one job, however often it is sent --


def test_the_same_idempotency_key_gives_the_same_id() -> None:
    assert job(idempotency_key="k").id == job(REQUEST | {"temperature": 1}, idempotency_key="k").id
    assert job(idempotency_key="k").id != job(idempotency_key="l").id


def test_tenants_do_not_share_idempotency_keys() -> None:
    assert job(idempotency_key="k", tenant="a").id != job(idempotency_key="k", tenant="b").id


def test_an_id_given_by_the_caller_is_kept() -> None:
    assert job(id="mine", idempotency_key="k").id == "mine"


@pytest.mark.parametrize("change", [{"model": "n"}, {"messages": [{"role": "user", "content": "Bye"}]}, {"top_p": 1}])
def test_the_hash_tells_different_requests_apart(change: dict[str, Any]) -> None:
    assert with_parameters(**change).request_hash() != job().request_hash()


def test_the_hash_tells_providers_apart() -> None:
    assert job(provider="p").request_hash() != job().request_hash()
    assert with_parameters(provider="p").request_hash() != job(provider="p").request_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"a": 1}},
        {"max_attempts": 2},
        {"total_timeout": 9},
        {"expires_at": "2030-01-01T00:00:00Z"},
        {"class": "bulk"},
        {"fallbacks": [TARGET]},
    ],
)
def test_the_hash_leaves_out_what_a_repetition_may_change(change: dict[str, Any]) -> None:
    assert job(**change).request_hash() == job().request_hash()
