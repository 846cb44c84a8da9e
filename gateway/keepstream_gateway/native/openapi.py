"""The OpenAPI document of the native addresses.

In: the contract's JSON Schemas.  Out: one document of OpenAPI 3.1 that refers to nothing outside itself.
"""

import json
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from keepstream import names
from keepstream_gateway.access.rights import May
from keepstream_gateway.native.listing import DEFAULT_LIMIT, MOST

_TEXT: Final = {"type": "string"}
_JOB_ID: Final = {"name": "job_id", "in": "path", "required": True, "schema": {**_TEXT, "pattern": names.ID_PATTERN}}
_IDEMPOTENCY_KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key is the same job, however often it is sent; with another request it is an error (422).",
    "schema": {**_TEXT, "minLength": 1, "maxLength": 256},
}
#: What may go wrong, by status; each has the same body.
_FAILURES: Final = {
    "400": "The request is not as it must be; `param` names what is wrong.",
    "401": "The API key or token is missing, wrong, expired or revoked.",
    "403": "The API key or token lacks the right.",
    "404": "There is no such job of this tenant.",
    "408": "The body did not come in time.",
    "409": "The job is in a state in which this cannot be done.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "422": "The idempotency key or id belongs to another request.",
    "429": "Too many streams are open; Retry-After says when to come back.",
    "503": "The database or Redis is away; Retry-After says when to come back. Nothing was stored.",
}


def document() -> str:
    """Return the document as JSON text."""
    return json.dumps(_document(), ensure_ascii=False, separators=(",", ":"))


def _document() -> dict[str, Any]:
    return {
        "openapi": "3.1.1",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {
            "title": "Keepstream",
            "version": version(names.DISTRIBUTION),
            "description": "Jobs, their live events and their results. Types and fields that are not listed may come.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, from `keepstream keys create`.",
                },
                "token": {"type": "apiKey", "in": "query", "name": "token", "description": "A token for one job."},
            },
            "responses": {f"Error{status}": _failure(text) for status, text in _FAILURES.items()},
            "schemas": _schemas(),
        },
    }


def _paths() -> dict[str, Any]:
    of_job = {"parameters": [_JOB_ID]}
    accepted = _answer("Accepted: it is stored, and will reach a final status.", _ref("Accepted"))
    return {
        "/api/jobs": {
            "post": _operation(
                "createJob",
                "Enqueue a job.",
                {"202": accepted},
                "400 401 403 408 413 415 422 503",
                body=_ref("NewJob"),
                parameters=[_IDEMPOTENCY_KEY],
            ),
            "get": _operation(
                "listJobs",
                "List jobs, newest first. With a filter other than the time it looks at a limited number of them.",
                {"200": _answer("A page.", _ref("JobPage"))},
                "400 401 403 404 503",
                parameters=_filters(),
            ),
        },
        "/api/jobs/{job_id}": of_job
        | {
            "get": _operation(
                "getJob",
                "Return everything stored about a job.",
                {"200": _answer("The job.", _ref("CompletionResult"))},
                "400 401 403 404 503",
                by_token=True,
            ),
            "delete": _operation(
                "deleteJob",
                "Delete a job that has ended, with its result.",
                {"204": {"description": "It is deleted."}},
                "400 401 403 404 409 503",
            ),
        },
        "/api/jobs/{job_id}/cancel": of_job
        | {
            "post": _operation(
                "cancelJob",
                "Cancel a job in any state; once more changes nothing.",
                {"200": _answer("Its status now: a running job is cancelled in a moment.", _ref("Status"))},
                "400 401 403 404 503",
                by_token=True,
            )
        },
        "/api/jobs/{job_id}/retry": of_job
        | {
            "post": _operation(
                "retryJob",
                "Run a job that has ended again, as a new job with the same request.",
                {"202": accepted},
                "400 401 403 404 408 409 413 415 503",
                body={
                    "type": "object",
                    "properties": {
                        "force": {"type": "boolean", "default": False, "description": "Also a completed one."}
                    },
                    "additionalProperties": False,
                },
                body_required=False,
            )
        },
        "/api/jobs/{job_id}/token": of_job
        | {
            "post": _operation(
                "createToken",
                "Make a token by which a browser may follow this job.",
                {"201": _answer("The token.", _ref("Token"))},
                "400 401 403 404 408 413 415 503",
                body={
                    "type": "object",
                    "properties": {
                        "seconds": {"type": "number", "minimum": 1, "description": "How long it is good for."},
                        "may": {"type": "array", "minItems": 1, "items": {"enum": [may.value for may in May]}},
                    },
                    "additionalProperties": False,
                },
                body_required=False,
            )
        },
        "/api/jobs/{job_id}/events": of_job
        | {
            "get": _operation(
                "followJob",
                "Follow a job: server-sent events, past and live, each once and in order, to the terminal event."
                " The id of each is the cursor to come back with, at any gateway.",
                {
                    "200": {
                        "description": "A stream. The data of each event is a JSON text as in Event.",
                        "content": {"text/event-stream": {"schema": _ref("Event")}},
                    },
                    "204": {"description": "The cursor is that of the terminal event: there is no more to come."},
                },
                "400 401 403 404 429 503",
                parameters=[
                    _cursor("after", "query"),
                    _cursor("Last-Event-ID", "header"),
                ],
                by_token=True,
            )
        },
    }


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    failures: str,
    *,
    body: dict[str, Any] | None = None,
    body_required: bool = True,
    parameters: list[dict[str, Any]] | None = None,
    by_token: bool = False,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": answers
        | {status: {"$ref": f"#/components/responses/Error{status}"} for status in failures.split()},
    }
    if parameters:
        operation["parameters"] = parameters
    if by_token:
        operation["security"] = [{"key": []}, {"token": []}]
    if body is not None:
        operation["requestBody"] = {"required": body_required, "content": {"application/json": {"schema": body}}}
    return operation


def _filters() -> list[dict[str, Any]]:
    time = {**_TEXT, "format": "date-time"}
    statuses = {"type": "array", "items": _ref("JobStatus")}
    filters: dict[str, tuple[dict[str, Any], str]] = {
        "status": (statuses, "Only jobs in one of these states."),
        "model": (_TEXT, "Only jobs for this model."),
        "provider": (_TEXT, "Only jobs for this provider."),
        "since": (time, "Only jobs created then or later."),
        "until": (time, "Only jobs created before."),
        "before": (_TEXT, "`next_before` of the page before."),
        "limit": (
            {"type": "integer", "minimum": 1, "maximum": MOST, "default": DEFAULT_LIMIT},
            "Jobs of a page, at most.",
        ),
    }
    listed = [
        {"name": name, "in": "query", "schema": schema, "description": text} for name, (schema, text) in filters.items()
    ]
    metadata = {
        "name": "metadata",
        "in": "query",
        "style": "deepObject",
        "explode": True,
        "schema": {"type": "object", "additionalProperties": _TEXT},
        "description": "Only jobs whose metadata have these values: metadata[user]=u-17.",
    }
    return [*listed, metadata]


def _cursor(name: str, place: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "schema": {**_TEXT, "pattern": names.EVENT_ID_PATTERN},
        "description": "The id of the last event the reader has. The header wins.",
    }


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for name in ("job", "result", "event"):
        schema = _contract(name)
        schemas |= schema.pop("$defs")
        schemas[schema["title"]] = schema
    new_job = schemas.pop("Job")
    new_job["required"] = [field for field in new_job["required"] if field != "v"]
    new_job["description"] = "A job. Its tenant is that of the API key."
    return schemas | {
        "NewJob": new_job,
        "Accepted": _object(id=_TEXT, links=_object(job=_TEXT, events=_TEXT), optional={"retry_of": _TEXT}),
        "JobPage": _object(
            jobs={"type": "array", "items": _ref("JobSummary")},
            next_before={"type": ["string", "null"], "description": "The `before` of the next page; null: no more."},
            looked_back_to={
                "type": ["string", "null"],
                "format": "date-time",
                "description": "When the last job was created that was looked at; null: all were.",
            },
        ),
        "Status": _object(id=_TEXT, status=_ref("JobStatus")),
        "Token": _object(
            token=_TEXT,
            expires_at={"type": "integer", "description": "Seconds since 1970-01-01 UTC."},
            events={**_TEXT, "description": "Where to follow the job with it."},
        ),
        "Error": _object(
            error=_object(
                message=_TEXT,
                type=_TEXT,
                param={"type": ["string", "null"]},
                code={"type": ["string", "null"]},
            )
        ),
    }


def _contract(name: str) -> dict[str, Any]:
    text = (files("keepstream.schemas") / f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text.replace('"#/$defs/', '"#/components/schemas/'))
    del schema["$schema"]
    return schema


def _object(optional: dict[str, Any] | None = None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties | (optional or {})}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _failure(description: str) -> dict[str, Any]:
    return _answer(description, _ref("Error"))
