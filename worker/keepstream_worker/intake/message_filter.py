"""The message filter: is this queue item a Celery message that Celery can read?

In: the raw bytes of one item of the queue, from the transport.  Out: the decoded message, or the reason
why it is unreadable.  One malformed item stops a stock Celery worker, and the next worker too; a message
for an unknown task it acknowledges and drops.  What is refused here never reaches Celery.  Pure.
"""

import base64
import json
from dataclasses import dataclass
from typing import Any, Final

import orjson

from keepstream import names

#: Bytes of a queue item: a job of the largest size in base64, and its envelope.
MAX_MESSAGE_BYTES: Final = 12 * 1024 * 1024
#: Levels of nesting in a body; Celery's decoder gives up at twice as many, and logs what it could not read.
MAX_LEVELS: Final = 400


#: Headers that must be empty, with their empty values. What they ask of Celery would live in one worker's
#: memory, or does not apply; the job has limits of its own.
_UNSUPPORTED_HEADERS: Final[dict[str, tuple[Any, ...]]] = {
    "eta": (None,),
    "expires": (None,),
    "timelimit": (None, [None, None]),
    "retries": (None, 0),
    "shadow": (None,),
    "group": (None,),
    "groups": (None, []),
    "stamped_headers": (None, []),
}


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An item that must not be given to Celery."""

    reason: str  #: Names the field; holds no value of it.
    task_id: str | None = None


def read_message(raw: bytes) -> dict[str, Any] | Unreadable:
    """Return the message in ``raw``, checked and reduced to what Celery needs, or why it is unreadable.

    What Celery does not see cannot harm it.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        return Unreadable(f"the message has {len(raw)} bytes, more than {MAX_MESSAGE_BYTES}")
    try:
        message = orjson.loads(raw)
    except ValueError:
        return Unreadable("the message is not JSON")
    if not isinstance(message, dict):
        return Unreadable("the message is not a JSON object")
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict):
        return Unreadable("'headers' is not an object; Celery's message protocol 2 is needed")
    task_id = headers.get("id")
    if not isinstance(task_id, str) or not 0 < len(task_id) <= 255:
        return Unreadable("'headers.id' is not a text of 1 to 255 characters")
    if not isinstance(properties, dict):
        return Unreadable("'properties' is not an object", task_id)
    reason = _find_fault(message, headers, properties)
    return Unreadable(reason, task_id) if reason is not None else _reduce(message, task_id, properties)


def _reduce(message: dict[str, Any], task_id: str, properties: dict[str, Any]) -> dict[str, Any]:
    delivery = properties["delivery_info"]
    return {
        "body": message["body"],
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": names.TASK, "id": task_id},
        "properties": {
            "body_encoding": properties.get("body_encoding"),
            "delivery_tag": properties["delivery_tag"],
            "delivery_info": {name: delivery.get(name, "") for name in ("exchange", "routing_key")},
        },
    }


def _find_fault(message: dict[str, Any], headers: dict[str, Any], properties: dict[str, Any]) -> str | None:
    if headers.get("task") != names.TASK:
        return f"'headers.task' is not {names.TASK}"
    for name, empty in _UNSUPPORTED_HEADERS.items():
        if headers.get(name) not in empty:
            return f"'headers.{name}' is not supported; use the job's own fields"
    tag = properties.get("delivery_tag")
    if not isinstance(tag, str) or not 0 < len(tag) <= 255:
        return "'properties.delivery_tag' is not a text of 1 to 255 characters"
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict) or not all(
        isinstance(delivery.get(name, ""), str) for name in ("exchange", "routing_key")
    ):
        return "'properties.delivery_info' is not an object with 'exchange' and 'routing_key'"
    if message.get("content-type") != "application/json":
        return "'content-type' is not application/json"
    encoding = message.get("content-encoding")
    if not isinstance(encoding, str) or encoding.lower() not in ("utf-8", "utf8"):
        return "'content-encoding' is not utf-8"
    return _find_body_fault(message.get("body"), properties.get("body_encoding"))


def _find_body_fault(body: Any, encoding: Any) -> str | None:
    if not isinstance(body, str):
        return "'body' is not a text"
    text = body
    if encoding == "base64":
        try:
            text = base64.b64decode(body, validate=True).decode()
        except ValueError:
            return "'body' is not UTF-8 in base64"
    elif encoding is not None:
        return "'properties.body_encoding' is not base64"
    try:
        # With Celery's decoder, which refuses what others accept: integers of 5,000 digits, for instance.
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "the body is not JSON, or nested too deeply"
    # The walk is slow, and a text with few brackets needs none.
    if text.count("[") + text.count("{") > MAX_LEVELS and _is_deeper_than(MAX_LEVELS, content):
        return f"the body is nested deeper than {MAX_LEVELS} levels"
    if not (
        isinstance(content, list)
        and len(content) == 3
        and isinstance(content[0], list)
        and isinstance(content[1], dict)
        and isinstance(content[2], dict | None)
    ):
        return "the body is not [args, kwargs, embed]"
    if len(content[0]) != 1 or content[1]:
        return f"{names.TASK} takes exactly one argument, the job"
    return None


def _is_deeper_than(levels: int, content: Any) -> bool:
    """Walk level by level: recursion would itself fail at the depth that is to be found."""
    level = [content]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
