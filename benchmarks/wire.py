"""Wire formats written by hand: a Celery message, an HTTP request, a RESP command.

In: values.
Out: bytes, to the contenders, the floor and the followers, at no more cost than the bytes themselves.
"""

import base64
import json
import uuid
from typing import Any
from urllib.parse import urlsplit


def celery_message(task: str, task_id: str, queue: str, *args: object) -> bytes:
    """Return a task call as Celery's message protocol 2 puts it on a Redis list."""
    body = [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    headers = {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None, "group": None}
    properties = {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    message = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(message).encode()


def completion_body(script: dict[str, Any]) -> dict[str, Any]:
    """Return the chat-completions parameters of every benchmark request; ``script`` says what the provider sends."""
    return {"model": "scripted", "messages": [{"role": "user", "content": "go"}], "script": script}


def completion_request(base_url: str, script: dict[str, Any]) -> bytes:
    """Return the HTTP request for a streamed completion."""
    url = urlsplit(base_url)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(completion_body(script) | options).encode()
    head = (
        f"POST {url.path}/chat/completions HTTP/1.1\r\n"
        f"Host: {url.netloc}\r\nAuthorization: Bearer none\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def address(base_url: str) -> tuple[str, int]:
    """Return host and port."""
    url = urlsplit(base_url)
    assert url.hostname is not None
    assert url.port is not None
    return url.hostname, url.port


def resp_command(*parts: bytes) -> bytes:
    """Return a Redis command as RESP."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
