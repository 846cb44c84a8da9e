"""Put one job on the queue, without any code of Keepstream: JSON, base64 and a Redis client are enough.

In: the broker's URL, a prompt, a model.  Out: a Celery message (protocol 2) on the list ``completions``; the job's
id on standard output.  Exists to be read by whoever writes a producer in another language::

    python raw_producer.py redis://127.0.0.1:6379/0 "Write a haiku about Zürich" scripted-1
"""

import base64
import json
import sys
import uuid

import redis

broker_url, prompt, model = sys.argv[1:4]

job = {
    "id": uuid.uuid4().hex,  # yours to choose: send it again, and it stays one job
    "tenant": "default",
    "model": model,
    "messages": [{"role": "user", "content": prompt}],
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
