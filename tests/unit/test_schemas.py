"""The published schemas are current, and say what the models say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from jsonschema.protocols import Validator  # type: ignore[import-untyped]

from keepstream.errors import InvalidJobError
from keepstream.events import KNOWN_EVENTS, UnknownEvent, parse_event, snapshot_event, terminal_event
from keepstream.jobs import JobRef, parse_job
from keepstream.schemas import generate as generate_schemas
from tests.event_texts import attempt_failed, attempt_finished, delta, ended, snapshot, started
from tests.jobs import make_job
from tests.unit.test_events import result

EVENTS = [
    started("1-1"),
    delta("1-2", "x", tool_calls=[{"index": 0, "id": "a", "name": "f", "arguments": "{}"}]),
    snapshot("1-3", "x", tool_calls=[{"id": "a", "name": "f", "arguments": "{}", "arguments_valid": True}]),
    attempt_failed("1-4"),
    attempt_finished("2-5"),
    *(ended("2-6", status, "x") for status in ("completed", "failed", "cancelled", "expired")),
    terminal_event(result()).model_dump_json(),
    snapshot_event(result(), "1-8").model_dump_json(),
]


def read(name: str) -> Any:
    return json.loads((generate_schemas.DIRECTORY / name).read_text(encoding="utf-8"))


def validator(name: str) -> Validator:
    schema = read(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_schemas_are_current() -> None:
    assert generate_schemas.outdated() == []


def test_the_check_names_what_differs_and_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate_schemas, "DIRECTORY", tmp_path / "schemas")
    monkeypatch.setattr(sys, "argv", ["generate", "--check"])
    assert generate_schemas.main() == 1
    message = capsys.readouterr().err
    assert "job.schema.json" in message
    assert "python -m keepstream.schemas.generate" in message
    generate_schemas.write()
    assert generate_schemas.main() == 0


def test_the_generator_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "keepstream.schemas.generate", "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_every_type_of_event_has_a_sample_here() -> None:
    assert {json.loads(text)["type"] for text in EVENTS} == KNOWN_EVENTS.keys()


@pytest.mark.parametrize("text", EVENTS)
def test_events_are_valid_and_readable(text: str) -> None:
    validator("event.schema.json").validate(json.loads(text))
    assert parse_event(text).type == json.loads(text)["type"]


@pytest.mark.parametrize("missing", ["v", "id", "job_id", "attempt", "ts", "type", "delta"])
def test_an_event_without_its_head_is_invalid(missing: str) -> None:
    event = json.loads(delta("1-2", "x"))
    del event[missing]
    assert not validator("event.schema.json").is_valid(event)


def test_an_event_with_new_fields_stays_valid() -> None:
    validator("event.schema.json").validate({**json.loads(delta("1-2", "x")), "new": 1})


@pytest.mark.parametrize("type_", ["job.paused", "", "deltas"])
def test_an_event_of_a_new_type_stays_valid(type_: str) -> None:
    event = {**json.loads(delta("1-2", "x")), "type": type_}
    validator("event.schema.json").validate(event)
    assert isinstance(parse_event(json.dumps(event)), UnknownEvent)


def test_jobs_are_valid_as_they_are_sent() -> None:
    job = make_job(
        temperature=1,
        x_vendor={"a": None},
        max_attempts=2,
        expires_at="2030-01-01T00:00:00Z",
        job_class="bulk",
        fallbacks=[{"provider": "q", "model": "n"}],
    )
    validator("job.schema.json").validate(job.to_wire())


def test_the_schema_of_a_job_takes_any_request_and_no_unknown_field() -> None:
    job = make_job().to_wire()
    valid = validator("job.schema.json").is_valid
    assert valid(job | {"request": job["request"] | {"metadata": 1, "provider": [], "max_attempt": "x"}})
    assert not valid(job | {"max_attempt": 3})


REFUSED_FIELDS: list[dict[str, Any]] = [
    {"tenant": "a b"},
    {"max_attempts": 0},
    {"idle_timeout": -1},
    {"v": 1},
    {"v": "2"},
    {"class": "batch"},
    {"job_class": "bulk"},
    {"fallbacks": [{"provider": "q"}]},
    {"fallbacks": [{"provider": "q", "model": ""}]},
    {"fallbacks": [{"provider": "q", "model": "n", "url": "x"}]},
    {"fallbacks": [{"provider": "q", "model": "n"}] * 2},
    {"fallbacks": [{"provider": "q", "model": f"n{number}"} for number in range(9)]},
]
REFUSED_PARAMETERS: list[dict[str, Any]] = [{"model": ""}, {"messages": []}, {"stream": True}, {"base_url": "x"}]


@pytest.mark.parametrize(
    "change", [*REFUSED_FIELDS, *({"request": make_job().request | parameters} for parameters in REFUSED_PARAMETERS)]
)
def test_jobs_that_are_refused_are_invalid(change: dict[str, Any]) -> None:
    job = make_job().to_wire() | change
    assert not validator("job.schema.json").is_valid(job)
    with pytest.raises(InvalidJobError):
        parse_job(job)


@pytest.mark.parametrize("field", ["v", "request"])
def test_a_job_without_its_head_is_invalid(field: str) -> None:
    job = make_job().to_wire()
    del job[field]
    assert not validator("job.schema.json").is_valid(job)
    with pytest.raises(InvalidJobError):
        parse_job(job)


def keywords(value: Any) -> Iterator[tuple[str, Any]]:
    """Give every name of an object in a document, with its value."""
    if isinstance(value, dict):
        yield from value.items()
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keywords(part)


@pytest.mark.parametrize("name", ["job", "event", "result"])
def test_only_types_have_titles(name: str) -> None:
    """Of a title, generators of code make a type of its own."""
    schema = read(f"{name}.schema.json")
    titles = [title for keyword, title in keywords(schema) if keyword == "title"]
    types = {"Job", "Request", "Event", "Result", *schema.get("$defs", ())}
    assert set(titles) <= types
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("name", sorted(generate_schemas.documents()))
def test_no_document_has_the_keyword_of_openapi_that_strict_validators_refuse(name: str) -> None:
    assert "discriminator" not in [keyword for keyword, _ in keywords(read(name))]


def test_results_are_valid() -> None:
    validator("result.schema.json").validate(json.loads(result().model_dump_json()))


def test_the_asyncapi_document_refers_only_to_what_is_in_it() -> None:
    document = read("asyncapi.json")
    references = [value for keyword, value in keywords(document) if keyword == "$ref"]
    assert len(references) > len(KNOWN_EVENTS)
    for reference in references:
        root, *parts = reference.split("/")
        assert root == "#"
        found = document
        for part in parts:
            found = found[part]


def test_a_message_on_the_queue_is_a_job_or_names_one() -> None:
    schemas = read("asyncapi.json")["components"]["schemas"]
    job = make_job()
    message = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Message", "components": {"schemas": schemas}}
    )
    for valid in (job.to_wire(), JobRef(tenant=job.tenant, id=job.id).to_wire(), {"v": 2, "id": "a"}):
        message.validate(valid)
    for invalid in ({"v": 2}, {"id": "a"}, {"v": 2, "id": "a", "metadata": {}}, {"v": 2, "id": "a b"}):
        assert not message.is_valid(invalid)


def test_the_asyncapi_document_carries_every_type_of_event() -> None:
    messages = read("asyncapi.json")["channels"]["events"]["messages"]
    assert messages.keys() == {model.__name__ for model in KNOWN_EVENTS.values()}
