"""The sender writes the messages that Celery itself would write."""

import base64
import json
import os
import socket
from typing import Any

import pytest
import redis
from celery import Celery

from keepstream import names
from keepstream.client.sender import Sender
from tests.jobs import make_job

PROMPT = "Grüße „aus“ Zürich 🌊 \\ \" \x00 ' \u2028"


def items(redis_url: str, queue: str) -> list[str]:
    """Return what lies on the queue, oldest first."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as connection:
        found: Any = connection.lrange(queue, 0, -1)
    return list(reversed(found))


def sent_by_celery(redis_url: str, queue: str, job: dict[str, Any]) -> None:
    app = Celery("reference", broker=redis_url, set_as_current=False, fixups=[])
    app.conf.update(task_serializer="json", task_protocol=2)
    shown = {"argsrepr": f"({job['id']},)", "kwargsrepr": "{}"}  # else the prompt stands in the headers
    app.send_task(names.TASK, args=[job], task_id=job["id"], queue=queue, **shown)
    app.close()


@pytest.mark.parametrize("queue", [names.QUEUE, "elsewhere"])
def test_a_message_is_to_the_byte_the_one_that_celery_sends(redis_url: str, queue: str) -> None:
    job = make_job(messages=[{"role": "user", "content": PROMPT}], temperature=0.1).to_wire()
    sender = Sender(redis_url, queue)
    sender.send(job)
    sender.close()
    sent_by_celery(redis_url, queue, job)
    ours, celerys = items(redis_url, queue)
    expected = json.loads(celerys)
    # These differ between any two messages or senders.
    assert ours != celerys
    mine = json.loads(ours)
    expected["properties"]["delivery_tag"] = mine["properties"]["delivery_tag"]
    expected["headers"]["origin"] = mine["headers"]["origin"]
    assert expected["properties"]["reply_to"], "Celery names a queue for results, which nobody sends"
    expected["properties"]["reply_to"] = ""
    assert ours == json.dumps(expected)


def test_a_message_says_where_it_comes_from_and_shows_no_prompt(redis_url: str) -> None:
    job = make_job(messages=[{"role": "user", "content": PROMPT}]).to_wire()
    sender = Sender(redis_url)
    sender.send(job)
    sender.send(job)
    sender.close()
    first, second = (json.loads(item) for item in items(redis_url, names.QUEUE))
    assert first["headers"]["origin"] == f"keepstream{os.getpid()}@{socket.gethostname()}"
    assert first["properties"]["delivery_tag"] != second["properties"]["delivery_tag"]
    body = first.pop("body")
    assert "Zürich" not in json.dumps(first, ensure_ascii=False)
    (sent,), kwargs, _ = json.loads(base64.b64decode(body))
    assert sent == job
    assert kwargs == {}
