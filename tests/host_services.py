"""Services of other people, as they run them: a web service and a Celery application, each with one client for all.

In: Keepstream's settings in the environment; questions, over HTTP or as Celery tasks.
Out: for each question, what a follower saw of its job and what is stored of it.

The client is made and used when the module is imported: with gunicorn's `--preload`, and with Celery's prefork pool,
that is before the processes are forked that use it afterwards.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import parse_qs

from celery import Celery

from keepstream import Client
from keepstream.transcript import Transcript

_Respond = Callable[[str, list[tuple[str, str]]], Any]

client: Final = Client.from_env()


def answer(question: str) -> dict[str, Any]:
    """Have a job answered by the question itself; return what came of it."""
    job_id = client.enqueue(
        {
            "model": "scripted-1",
            "messages": [{"role": "user", "content": question}],
            "script": {"text": question, "rate": 100},
        }
    )
    transcript = Transcript()
    for event in client.follow(job_id, timeout=120):
        transcript.apply(event)
    result = client.get(job_id)
    assert result is not None
    return {
        "id": job_id,
        "status": result.status,
        "followed": transcript.text,
        "stored": result.text,
        "attempts": len(result.attempts),
        "process": os.getpid(),
    }


def application(environ: dict[str, Any], start_response: _Respond) -> Iterable[bytes]:
    """The web service: `GET /?question=...`."""
    body = json.dumps(answer(parse_qs(environ["QUERY_STRING"])["question"][0])).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


app: Final = Celery("host", broker=os.environ.get("HOST_BROKER_URL"), backend=os.environ.get("HOST_BROKER_URL"))
app.task(answer, name="answer")

answer("Is anybody there?")
