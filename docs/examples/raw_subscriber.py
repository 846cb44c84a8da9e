"""Watch one job to its end, without any code of Keepstream: SUBSCRIBE for what is new, XRANGE for what was before.

In: the URL of Redis, a job's id.  Out: its events on standard output, one JSON text a line; exit code 0 if the
text held at the end has the SHA-256 that the last event names.  Exists to be read by whoever writes a follower in
another language::

    python raw_subscriber.py redis://127.0.0.1:6379/0 JOB_ID
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import redis

SILENCE = 15.0  #: Seconds without an event after which to look into the log: pub/sub may lose one.


def place(event: dict[str, Any]) -> tuple[int, int]:
    """Return the event's place, (attempt, n), from its id, ``<attempt>-<n>``."""
    attempt, n = event["id"].split("-")
    return int(attempt), int(n)


def follow(client: redis.Redis, job_id: str, tenant: str = "default") -> Iterator[dict[str, Any]]:
    """Give every event of a job once and in order, whenever the reader comes."""
    name = f"keepstream:{tenant}:{{{job_id}}}"
    last = (0, 0)
    with client.pubsub() as pubsub:
        pubsub.subscribe(f"{name}:events")
        while True:
            # The first message confirms the subscription.  What was sent before it is in the log; nothing is missed.
            message = pubsub.get_message(timeout=SILENCE)
            texts = [message["data"]] if message and message["type"] == "message" else None
            if texts is None or not comes_next(json.loads(texts[0]), last):
                entries: Any = client.xrange(f"{name}:log", min=f"({last[0]}-{last[1]}")
                texts = [fields[b"event"] for _, fields in entries]
            for event in map(json.loads, texts):
                if place(event) > last:
                    last = place(event)
                    yield event
                    if event["type"].startswith("job."):
                        return


def comes_next(event: dict[str, Any], last: tuple[int, int]) -> bool:
    """Tell whether no event is missing between ``last`` and this one; n counts without gaps within an attempt."""
    attempt, n = place(event)
    return event["type"] == "snapshot" or n == (last[1] + 1 if attempt == last[0] else 1)


def main() -> bool:
    """Print the events; return whether the text held at the end is the stored one."""
    url, job_id = sys.argv[1:3]
    texts: dict[int, str] = {}  # choice index to content
    attempt = 0
    with redis.Redis.from_url(url, socket_timeout=SILENCE + 5) as client:
        for event in follow(client, job_id):
            print(json.dumps(event, ensure_ascii=False), flush=True)
            if event["attempt"] > attempt or event["type"] == "attempt.failed":  # what was sent before is void
                texts, attempt = {}, event["attempt"]
            if event["type"] == "delta":
                texts[event["choice"]] = texts.get(event["choice"], "") + (event["delta"].get("content") or "")
            elif event["type"] == "snapshot":  # stands for everything before it
                texts = {choice["index"]: choice["content"] for choice in event["choices"]}
            elif event["type"].startswith("job."):
                held = "".join(texts[index] for index in sorted(texts))
                return hashlib.sha256(held.encode()).hexdigest() == event["output_sha256"]
    return False


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
