"""A service without any Keepstream code: it sends, watches, cancels and queries by the documents alone."""

import ast
import base64
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psycopg
import psycopg.rows
import pytest
import redis

from tests.cluster import PATIENCE, Cluster, wait_until

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
MODEL = "scripted-1"


def start(example: str, *arguments: str) -> subprocess.Popen[str]:
    """Start an example as a reader would, outside this project."""
    command = [sys.executable, "-I", str(EXAMPLES / example), *arguments]
    return subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Return the output of an example that succeeded."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err or out
    return out


def events(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def push(cluster: Cluster, job: dict[str, Any], task_id: str | None = None) -> str:
    """Send a job as docs/examples/raw_producer.py does, and return its id."""
    job_id = task_id or str(job["id"])
    message = {
        "body": base64.b64encode(json.dumps([[job], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": "completions.run", "id": job_id},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "completions"},
        },
    }
    with redis.Redis.from_url(cluster.valkey.url) as client:
        client.lpush("completions", json.dumps(message))
    return job_id


def query(cluster: Cluster, job_id: str) -> list[list[dict[str, Any]]]:
    """Return the rows of each statement in raw_query.sql, by the database's plain driver."""
    text = re.sub(r"^--.*$", "", (EXAMPLES / "raw_query.sql").read_text(), flags=re.MULTILINE)
    statements = [statement for statement in text.split(";") if statement.strip()]
    if cluster.database_url.startswith("sqlite:///"):
        with sqlite3.connect(cluster.database_url.removeprefix("sqlite:///")) as connection:
            connection.row_factory = sqlite3.Row
            answers = [connection.execute(statement, {"job_id": job_id}).fetchall() for statement in statements]
        connection.close()
        return [[dict(row) for row in answer] for answer in answers]
    url = cluster.database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, row_factory=psycopg.rows.dict_row) as session:
        return [
            session.execute(statement.replace(":job_id", "%(job_id)s").encode(), {"job_id": job_id}).fetchall()
            for statement in statements
        ]


def status(cluster: Cluster, job_id: str) -> str | None:
    (answer, *_) = query(cluster, job_id)
    return answer[0]["status"] if answer else None


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("raw_*.py")), ids=lambda path: path.stem)
def test_examples_import_the_standard_library_and_a_redis_client_only(example: Path) -> None:
    tree = ast.parse(example.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"redis"}


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("raw_*.py")), ids=lambda path: path.stem)
def test_examples_without_arguments_say_what_they_need(example: Path) -> None:
    process = start(example.name)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.startswith(f"usage: python {example.name} REDIS_URL ")


def test_job_sent_by_hand_is_watched_with_a_plain_redis_client_and_read_with_plain_sql(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    job_id = finish(start("raw_producer.py", cluster.valkey.url, "Grüße aus Zürich 🌊", MODEL)).strip()
    seen = events(finish(start("raw_subscriber.py", cluster.valkey.url, job_id)))

    text = "".join(event["delta"].get("content", "") for event in seen if event["type"] == "delta")
    assert "你好" in text
    assert [event["id"] for event in seen] == [f"1-{n}" for n in range(1, len(seen) + 1)]
    assert [seen[0]["type"], seen[-2]["type"], seen[-1]["type"]] == [
        "attempt.started",
        "attempt.finished",
        "job.completed",
    ]
    [job], [choice], calls, [attempt] = query(cluster, job_id)
    assert (job["status"], job["model"], job["usage_source"], choice["finish_reason"]) == (
        "completed",
        MODEL,
        "provider",
        "stop",
    )
    assert choice["content"] == text
    assert job["output_sha256"] == seen[-1]["output_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert job["total_tokens"] == attempt["total_tokens"] == seen[-1]["usage"]["total_tokens"]
    assert calls == []
    assert (attempt["number"], attempt["outcome"]) == (1, "finished")


def test_message_of_the_example_is_the_one_that_celery_itself_would_send(cluster: Cluster) -> None:
    """Field by field; Celery sends more, which nobody needs."""
    by_hand = finish(start("raw_producer.py", cluster.valkey.url, "Hello", MODEL)).strip()
    by_celery = cluster.job()
    cluster.send(by_celery)
    with cluster.redis() as client:
        items: Any = client.lrange("completions", 0, -1)
    theirs, ours = (json.loads(item) for item in items)
    for part in ("headers", "properties"):
        assert ours[part].keys() <= theirs[part].keys()
    same = [("content-type",), ("content-encoding",), ("headers", "task"), ("headers", "lang")]
    same += [("properties", "body_encoding"), ("properties", "delivery_info")]
    for path in same:
        left, right = ours, theirs
        for key in path:
            left, right = left[key], right[key]
        assert left == right, path
    ours_args, theirs_args = (json.loads(base64.b64decode(item["body"]))[0] for item in (ours, theirs))
    assert [ours_args[0]["id"], theirs_args[0]["id"]] == [by_hand, by_celery["id"]]
    assert [ours["headers"]["id"], theirs["headers"]["id"]] == [by_hand, by_celery["id"]]


def test_tool_calls_are_read_with_plain_sql(any_cluster: Cluster) -> None:
    cluster = any_cluster
    cluster.start_worker()
    arguments = {"city": "Zürich 🌊"}
    job_id = push(
        cluster, cluster.job(text="", tool_calls=[{"name": "look_up", "id": "call_1", "arguments": arguments}])
    )
    seen = events(finish(start("raw_subscriber.py", cluster.valkey.url, job_id)))
    _, _, [call], _ = query(cluster, job_id)
    assert (call["call_id"], call["name"], bool(call["arguments_valid"])) == ("call_1", "look_up", True)
    assert json.loads(call["arguments"]) == arguments
    assert seen[-1]["tool_call_ids"] == ["call_1"]


def test_plain_follower_holds_the_stored_text_after_a_retry(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = push(cluster, cluster.job(text="eins zwei drei vier", faults=[{"kind": "cut", "after": 2}]))
    types = [event["type"] for event in events(finish(start("raw_subscriber.py", cluster.valkey.url, job_id)))]
    assert types.count("attempt.started") == 2
    assert types.count("attempt.failed") == 1


def test_plain_follower_that_comes_after_the_end_gets_everything_from_the_log(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = push(cluster, cluster.job(deltas=5))
    wait_until(lambda: status(cluster, job_id) == "completed", "the stored result")
    seen = events(finish(start("raw_subscriber.py", cluster.valkey.url, job_id)))
    assert [event["type"] for event in seen if event["type"] == "delta"] == ["delta"] * 5


def test_running_job_is_cancelled_by_hand(cluster: Cluster) -> None:
    cluster.start_worker()
    job_id = push(cluster, cluster.job(deltas=3000, rate=20))
    cluster.wait_for_deltas(job_id, 5)
    subscriber = start("raw_subscriber.py", cluster.valkey.url, job_id)
    finish(start("raw_cancel.py", cluster.valkey.url, job_id))

    assert events(finish(subscriber))[-1]["type"] == "job.cancelled"
    [job], [choice], _, [attempt] = query(cluster, job_id)
    assert (job["status"], bool(job["partial"]), attempt["outcome"]) == ("cancelled", True, "cancelled")
    assert choice["content"].startswith("word word ")


def test_job_cancelled_by_hand_while_its_message_waits_is_never_run(cluster: Cluster) -> None:
    job_id = push(cluster, cluster.job(deltas=5, rate=1))
    finish(start("raw_cancel.py", cluster.valkey.url, job_id))
    cluster.start_worker()
    assert events(finish(start("raw_subscriber.py", cluster.valkey.url, job_id)))[-1]["type"] == "job.cancelled"
    assert status(cluster, job_id) == "cancelled"


def test_job_that_names_no_id_has_the_id_of_its_task_however_often_it_is_sent(cluster: Cluster) -> None:
    job = cluster.job(deltas=3, limits={"idempotency_key": None})  # as some languages write what is not set
    del job["id"]
    for _ in range(3):
        push(cluster, job, task_id="chosen-by-the-producer")
    cluster.start_worker()
    finish(start("raw_subscriber.py", cluster.valkey.url, "chosen-by-the-producer"))
    with cluster.redis() as client:
        wait_until(lambda: client.llen("completions") == 0, "all messages to be taken")
    assert [summary.id for summary in cluster.client.list()] == ["chosen-by-the-producer"]
    assert len(cluster.provider.attempts(job["request"]["script"]["key"])) == 1
