"""Put one job on the queue, without any code of Keepstream: JSON, base64 and a Redis client are enough.

In: the broker's URL, a prompt, a model.
Out: a Celery message (protocol 2) on the list ``completions``; the job's id on standard output.

An example to be translated into other languages::

    python raw_producer.py redis://127.0.0.1:6379/0 "Write a haiku about Zürich" scripted-1
"""

import base64
import json
import sys
import uuid

import redis

if len(sys.argv) != 4:
    sys.exit("usage: python raw_producer.py REDIS_URL PROMPT MODEL")
broker_url, prompt, model = sys.argv[1:]

job = {
    "v": 2,  # of the format
    "id": uuid.uuid4().hex,  # yours to choose: send it again, and it stays one job
    "tenant": "default",
    "request": {"model": model, "messages": [{"role": "user", "content": prompt}]},  # goes to the provider as it is
    "metadata": {"made_by": "raw_producer"},  # stored with the result, never sent to the provider
}
body = [[job], {}, {}]  # the task's arguments, its keyword arguments (none), its links (none)
message = {
    "body": base64.b64encode(json.dumps(body).encode()).decode(),
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "headers": {"lang": "py", "task": "completions.run", "id": job["id"]},
    "properties": {
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),  # a new one for every message
        "delivery_info": {"exchange": "", "routing_key": "completions"},
    },
}

with redis.Redis.from_url(broker_url) as client:
    client.lpush("completions", json.dumps(message))
print(job["id"])
