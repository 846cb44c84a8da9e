"""Cancel one job, queued or running, without any code of Keepstream: one SET and one PUBLISH.

In: the URL of Redis, a job's id.  Out: a key that whoever claims the job will find, and a message that tells the
workers to look at once.  Exists to be read by whoever writes a client in another language::

    python raw_cancel.py redis://127.0.0.1:6379/0 JOB_ID
"""

import json
import sys

import redis

url, job_id = sys.argv[1:3]

with redis.Redis.from_url(url) as client:
    client.set(f"keepstream:default:{{{job_id}}}:cancel", 1, ex=86_400)
    client.publish("keepstream:control", json.dumps({"tenant": "default", "job_id": job_id}))
