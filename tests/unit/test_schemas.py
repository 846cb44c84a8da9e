"""The published schemas are current, and say what the models say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from jsonschema.protocols import Validator  # type: ignore[import-untyped]

from keepstream.events import KNOWN_EVENTS, parse_event, snapshot_event, terminal_event
from keepstream.jobs import parse_job
from keepstream.schemas import generate as generate_schemas
from tests.event_texts import attempt_failed, attempt_finished, delta, ended, snapshot, started
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


def test_jobs_are_valid_as_they_are_sent() -> None:
    job = parse_job({"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1, "max_attempts": 2})
    validator("job.schema.json").validate(job.to_wire())


@pytest.mark.parametrize(
    "fields", [{"model": ""}, {"messages": []}, {"tenant": "a b"}, {"max_attempts": 0}, {"idle_timeout": -1}]
)
def test_jobs_that_would_be_refused_are_invalid(fields: dict[str, Any]) -> None:
    job = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert not validator("job.schema.json").is_valid(job | fields)


def test_results_are_valid() -> None:
    validator("result.schema.json").validate(json.loads(result().model_dump_json()))


def test_the_asyncapi_document_refers_only_to_what_exists() -> None:
    files = {name: read(name) for name in generate_schemas.documents()}

    def resolve(reference: str) -> None:
        name, _, pointer = reference.removeprefix("./").partition("#")
        found = files[name or "asyncapi.json"]
        for part in pointer.split("/")[1:]:
            found = found[part]

    def walk(value: Any) -> int:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                resolve(value["$ref"])
                return 1
            return sum(map(walk, value.values()))
        return sum(map(walk, value)) if isinstance(value, list) else 0

    assert walk(files["asyncapi.json"]) > len(KNOWN_EVENTS)


def test_the_asyncapi_document_carries_every_type_of_event() -> None:
    messages = read("asyncapi.json")["channels"]["events"]["messages"]
    assert messages.keys() == {model.__name__ for model in KNOWN_EVENTS.values()}
