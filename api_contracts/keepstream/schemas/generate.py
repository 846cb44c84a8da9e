"""The schemas: the contract for services that are not written in Python.

In: the models.
Out: ``schemas/*.json``, to anybody's generator or validator: JSON Schemas of jobs, events and results, and an AsyncAPI
document of the channels, which refers to nothing outside itself.

Only this module writes them, so that they agree with the models; a test compares.

    python -m keepstream.schemas.generate            writes them
    python -m keepstream.schemas.generate --check    exits with 1 if they are not current
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from keepstream import names
from keepstream.errors import ErrorCode
from keepstream.events import KNOWN_EVENT_ADAPTER, KNOWN_EVENTS, VERSION, UnknownEvent
from keepstream.jobs import Job, JobRef
from keepstream.results import CompletionResult, JobSummary

DIRECTORY: Final = Path(__file__).parent
_DIALECT: Final = {"$schema": "https://json-schema.org/draft/2020-12/schema"}


class _Generator(GenerateJsonSchema):
    """pydantic's generator, but for the titles of fields, of each of which code generators make a type."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def documents() -> dict[str, str]:
    """Return the JSON text of each document by its file name."""
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in {
            "job.schema.json": _DIALECT | Job.model_json_schema(schema_generator=_Generator),
            "event.schema.json": _event_schema(),
            "result.schema.json": _result_schema(),
            "asyncapi.json": _asyncapi(),
        }.items()
    }


def outdated() -> list[str]:
    """Return the names of the files that differ from the models."""
    return [
        name
        for name, text in documents().items()
        if not (DIRECTORY / name).is_file() or (DIRECTORY / name).read_text(encoding="utf-8") != text
    ]


def write() -> None:
    """Write every document."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in documents().items():
        (DIRECTORY / name).write_text(text, encoding="utf-8")


def _event_schema() -> dict[str, Any]:
    known = KNOWN_EVENT_ADAPTER.json_schema(schema_generator=_Generator)
    unknown = UnknownEvent.model_json_schema(schema_generator=_Generator)
    unknown["properties"]["type"] = {"type": "string", "not": {"enum": list(KNOWN_EVENTS)}}
    definitions = known["$defs"] | {
        "KnownEvent": {"description": "An event of a type that is listed here.", "oneOf": known["oneOf"]},
        "UnknownEvent": unknown,
    }
    for name in (*(model.__name__ for model in KNOWN_EVENTS.values()), "UnknownEvent"):
        # The models fill these in, so pydantic takes them for optional; a sender always sends them.
        event = definitions[name]
        event["required"] = list(dict.fromkeys(["v", "type", *event["required"]]))
        for filled_in in ("v", "type"):
            event["properties"][filled_in].pop("default", None)
    return {
        **_DIALECT,
        "title": "Event",
        "description": "What followers receive. Types and fields that are not listed may come; ignore them.",
        "anyOf": [{"$ref": "#/$defs/KnownEvent"}, {"$ref": "#/$defs/UnknownEvent"}],
        "$defs": definitions,
    }


def _message_definitions() -> dict[str, Any]:
    """Return what a message on the queue may bring, and what that consists of."""
    _, schema = models_json_schema([(Job, "validation"), (JobRef, "validation")], schema_generator=_Generator)
    definitions: dict[str, Any] = schema["$defs"]
    return definitions | {
        "Message": {
            "description": "A job, or the name of one that its producer has stored already.",
            "oneOf": [{"$ref": "#/$defs/Job"}, {"$ref": "#/$defs/JobRef"}],
        }
    }


def _result_schema() -> dict[str, Any]:
    _, schema = models_json_schema(
        [(CompletionResult, "serialization"), (JobSummary, "serialization")], schema_generator=_Generator
    )
    return {
        **_DIALECT,
        "title": "Result",
        "description": "A stored job: whole, or as a listing shows it ('#/$defs/JobSummary').",
        "$ref": "#/$defs/CompletionResult",
        **schema,
    }


def _asyncapi() -> dict[str, Any]:
    events = {model.__name__: _event_message(kind, model.__name__) for kind, model in KNOWN_EVENTS.items()}
    of_one_job = {
        "prefix": {"default": names.PREFIX, "description": "KEEPSTREAM_PREFIX of the workers."},
        "tenant": {"default": names.DEFAULT_TENANT, "description": "The job's tenant."},
        "taggedJobId": {
            "description": "The job id in braces, which keep a job's names in one cluster slot.",
            "examples": ["{3f2a9c7e51d04b6d8f0e1a2b3c4d5e6f}"],
        },
    }
    event_refs = {name: {"$ref": f"#/components/messages/{name}"} for name in events}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Keepstream, for a service that uses it",
            "version": f"{VERSION}.0.0",
            "description": (
                "Put a job on the queue; read its events on its channel and in its log. To lose nothing: subscribe,"
                " wait for Redis to confirm it, read the log, then go on with the channel. Apply an event only if its"
                " id, '<attempt>-<n>', is greater than the last one applied, compared as a pair of numbers; on a higher"
                " attempt, and on 'attempt.failed', drop the output so far; a 'snapshot' replaces it; if n skips"
                " otherwise, read the log again. The terminal event's output_sha256 proves that nothing is missing."
            ),
        },
        "defaultContentType": "application/json",
        "servers": {
            "redis": {"host": "localhost:6379", "protocol": "redis", "description": "KEEPSTREAM_REDIS_URL"},
            "broker": {"host": "localhost:6379", "protocol": "redis", "description": "KEEPSTREAM_BROKER_URL"},
        },
        "channels": {
            "queue": {
                "address": names.QUEUE,
                "servers": [{"$ref": "#/servers/broker"}],
                "description": "The Redis list of the Celery queue: LPUSH one message in Celery's protocol 2 per job.",
                "messages": {"JobMessage": {"$ref": "#/components/messages/JobMessage"}},
            },
            "events": {
                "address": "{prefix}:{tenant}:{taggedJobId}:events",
                "servers": [{"$ref": "#/servers/redis"}],
                "description": "Redis pub/sub: a job's events as they happen, one JSON text per message.",
                "parameters": of_one_job,
                "messages": event_refs,
            },
            "log": {
                "address": "{prefix}:{tenant}:{taggedJobId}:log",
                "servers": [{"$ref": "#/servers/redis"}],
                "description": (
                    "Redis stream: the same events, to be read with XRANGE. The entry's id is the event's id; the field"
                    " 'event' holds its JSON text. It is deleted some minutes after the end of the job."
                ),
                "parameters": of_one_job,
                "messages": event_refs,
            },
            "control": {
                "address": "{prefix}:control",
                "servers": [{"$ref": "#/servers/redis"}],
                "description": (
                    "Redis pub/sub: asks the workers to look at a job's cancellation at once. First SET"
                    " '{prefix}:{tenant}:{taggedJobId}:cancel' to 1 with EX 86400, for the case that no worker has"
                    " taken the job yet."
                ),
                "parameters": {"prefix": of_one_job["prefix"]},
                "messages": {"CancelNudge": {"$ref": "#/components/messages/CancelNudge"}},
            },
        },
        "operations": {
            "enqueueJob": _operation("send", "queue", "Hand over a job."),
            "followJob": _operation("receive", "events", "Watch a job."),
            "replayJob": _operation("receive", "log", "Read the events that were missed."),
            "cancelJob": _operation("send", "control", "Cancel a job in any state."),
        },
        "components": {
            "messages": {
                "JobMessage": {
                    "title": f"Celery message for the task {names.TASK}",
                    "payload": {"$ref": "#/components/schemas/JobMessage"},
                },
                "CancelNudge": {"payload": {"$ref": "#/components/schemas/CancelNudge"}},
                **events,
            },
            "schemas": {
                **_in_components(_message_definitions()),
                **_in_components(_event_schema()["$defs"]),
                "JobMessage": _job_message_schema(),
                "CancelNudge": {
                    "type": "object",
                    "required": ["tenant", "job_id"],
                    "properties": {"tenant": {"type": "string"}, "job_id": {"type": "string"}},
                },
                "ErrorCode": {
                    "description": "Codes of 'error.code'. New ones may be added.",
                    "type": "string",
                    "enum": [code.value for code in ErrorCode],
                },
            },
        },
    }


def _event_message(kind: str, model: str) -> dict[str, Any]:
    return {"name": kind, "payload": {"$ref": f"#/components/schemas/{model}"}}


def _in_components(definitions: dict[str, Any]) -> dict[str, Any]:
    """Return definitions of a JSON Schema as components of AsyncAPI, in which each event is a message of its own."""
    unions = {"KnownEvent", "UnknownEvent"}
    text = json.dumps({name: schema for name, schema in definitions.items() if name not in unions})
    moved: dict[str, Any] = json.loads(text.replace('"#/$defs/', '"#/components/schemas/'))
    return moved


def _operation(action: str, channel: str, summary: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": summary}


def _job_message_schema() -> dict[str, Any]:
    """The least that a producer without Celery must write for Celery to accept it."""
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["body", "content-type", "content-encoding", "headers", "properties"],
        "properties": {
            "body": {
                **text,
                "contentEncoding": "base64",
                "description": (
                    "Base64 of the JSON text [[job], {}, {}], where job is as in #/components/schemas/Message."
                ),
            },
            "content-type": {"const": "application/json"},
            "content-encoding": {"const": "utf-8"},
            "headers": {
                "type": "object",
                "required": ["lang", "task", "id"],
                "properties": {
                    "lang": {**text, "examples": ["go"]},
                    "task": {"const": names.TASK},
                    "id": {**text, "description": "The job's id."},
                },
            },
            "properties": {
                "type": "object",
                "required": ["body_encoding", "delivery_tag", "delivery_info"],
                "properties": {
                    "body_encoding": {"const": "base64"},
                    "delivery_tag": {**text, "description": "A new UUID."},
                    "delivery_info": {
                        "type": "object",
                        "required": ["exchange", "routing_key"],
                        "properties": {"exchange": {"const": ""}, "routing_key": {"const": names.QUEUE}},
                    },
                },
            },
        },
    }


def main() -> int:
    """Write the documents, or with ``--check`` compare them."""
    if sys.argv[1:] == ["--check"]:
        differing = outdated()
        if differing:
            sys.stderr.write(f"{', '.join(differing)}: not current; run: python -m keepstream.schemas.generate\n")
        return bool(differing)
    write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
