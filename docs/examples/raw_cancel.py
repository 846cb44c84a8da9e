"""Cancel one job, queued or running, without any code of Keepstream: one SET and one PUBLISH.

In: the URL of Redis, a job's id.
Out: a key, for the worker that takes the job later, and a message that tells all workers to look at once.

An example to be translated into other languages::

    python raw_cancel.py redis://127.0.0.1:6379/0 JOB_ID
"""

import json
import sys

import redis

if len(sys.argv) != 3:
    sys.exit("usage: python raw_cancel.py REDIS_URL JOB_ID")
url, job_id = sys.argv[1:]

with redis.Redis.from_url(url) as client:
    client.set(f"keepstream:default:{{{job_id}}}:cancel", 1, ex=86_400)
    client.publish("keepstream:control", json.dumps({"tenant": "default", "job_id": job_id}))
