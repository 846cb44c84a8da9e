"""The tutorial's worker: what a search for "Celery OpenAI streaming Redis pub/sub" turns up.

In: a job id, a channel and the provider's script, from the harness over Celery.
Out: one PUBLISH per delta, one INSERT of the text, then ``[DONE]``.

It is tuned as well as it can be: no result backend, pooled connections made once per process, hiredis.
"""

import asyncio
import os
import threading
from functools import cache
from typing import Any, Final

import openai
import redis
import redis.asyncio
import sqlalchemy as sa
import uvloop
from celery import Celery
from celery.signals import worker_process_init

from benchmarks.wire import completion_body

GENERATE: Final = "tutorial.generate"
GENERATE_ASYNC: Final = "tutorial.generate_async"
DONE: Final = "[DONE]"
FAILED: Final = "[FAILED]"

_MAX_CONNECTIONS: Final = 10_000
_STREAM: Final[dict[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}

completions: Final = sa.Table(
    "completions", sa.MetaData(), sa.Column("id", sa.String(64), primary_key=True), sa.Column("text", sa.Text)
)

app = Celery("tutorial", broker=os.environ.get("TUTORIAL_BROKER_URL"))
app.conf.update(
    task_ignore_result=True,
    task_default_queue=os.environ.get("TUTORIAL_QUEUE", "tutorial"),
    broker_connection_retry_on_startup=True,
    broker_transport_options={"max_connections": _MAX_CONNECTIONS},  # the default of 10 loses acknowledgements
    worker_prefetch_multiplier=1,
)


@cache
def openai_client() -> openai.OpenAI:
    """Return the process's client."""
    return openai.OpenAI(max_retries=0)


@cache
def redis_client() -> redis.Redis:
    """Return the process's client."""
    return redis.Redis.from_url(os.environ["TUTORIAL_REDIS_URL"], max_connections=_MAX_CONNECTIONS)


@cache
def database() -> sa.Engine:
    """Return the process's engine."""
    url = sa.make_url(os.environ["TUTORIAL_DATABASE_URL"])
    if url.get_backend_name() == "sqlite":
        # with SQLite's default of 5 s, some texts would be lost when a thousand streams end at once
        url = url.update_query_dict({"timeout": "60"})
    return sa.create_engine(url, pool_size=20)


@worker_process_init.connect
def _connect(**_: object) -> None:
    # once per prefork child, before its first task
    openai_client(), redis_client(), database()


@app.task(name=GENERATE)
def generate(job_id: str, channel: str, script: dict[str, Any]) -> None:
    """Stream one completion with the SDK's loop."""
    parts = []
    try:
        for chunk in openai_client().chat.completions.create(**_parameters(script)):
            if chunk.choices and (content := chunk.choices[0].delta.content):
                parts.append(content)
                redis_client().publish(channel, content)
    except (openai.OpenAIError, redis.RedisError):
        redis_client().publish(channel, FAILED)
        raise
    _finish(job_id, channel, "".join(parts))


@app.task(name=GENERATE_ASYNC)
def generate_async(job_id: str, channel: str, script: dict[str, Any]) -> None:
    """Stream one completion on the process's one event loop, and wait for it in the pool's thread."""
    try:
        text = asyncio.run_coroutine_threadsafe(_stream(channel, script), _loop()).result()
    except (openai.OpenAIError, redis.RedisError):
        redis_client().publish(channel, FAILED)
        raise
    _finish(job_id, channel, text)


async def _stream(channel: str, script: dict[str, Any]) -> str:
    parts = []
    async for chunk in await _async_openai_client().chat.completions.create(**_parameters(script)):
        if chunk.choices and (content := chunk.choices[0].delta.content):
            parts.append(content)
            await _async_redis_client().publish(channel, content)
    return "".join(parts)


def _parameters(script: dict[str, Any]) -> dict[str, Any]:
    body = completion_body(script)
    return _STREAM | {"model": body["model"], "messages": body["messages"], "extra_body": {"script": script}}


def _finish(job_id: str, channel: str, text: str) -> None:
    with database().begin() as connection:
        connection.execute(completions.insert().values(id=job_id, text=text))
    redis_client().publish(channel, DONE)


@cache
def _async_openai_client() -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(max_retries=0)


@cache
def _async_redis_client() -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(os.environ["TUTORIAL_REDIS_URL"], max_connections=_MAX_CONNECTIONS)


_loop_lock = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    with _loop_lock:
        return _started_loop()


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
