"""Records of unreadable messages go from Redis into the database, whatever lies between them."""

import json

import redis
import redis.asyncio

from keepstream.client import overview
from keepstream.client.database import make_engine
from keepstream.names import rejected_list
from keepstream_worker.store import schema
from keepstream_worker.store.database import WorkerDatabase
from keepstream_worker.upkeep.unreadable_messages import UnreadableMessages


def record(number: int) -> str:
    return json.dumps({"id": f"record-{number}", "reason": "no JSON", "size": 3, "task_id": None, "payload": "Pz8/"})


async def test_an_entry_that_is_no_record_is_recorded_too_and_holds_up_nothing(
    redis_url: str, database_url: str
) -> None:
    engine = make_engine(database_url, writer=True)
    schema.migrate(engine)
    entries = [record(1), "not JSON", "[]", json.dumps({"id": "half a record"}), record(2)]
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(rejected_list(), *entries)
        database = WorkerDatabase(engine)
        async with redis.asyncio.Redis.from_url(redis_url) as connection:
            await UnreadableMessages(connection, "keepstream", database).record(limit=100)
        database.close()
        assert client.llen(rejected_list()) == 0
    with engine.begin() as rows:
        reasons = [message.reason for message in overview.rejected(rows, 100)]
    not_ours = "an entry of the list of unreadable messages is not a record of one"
    assert sorted(reasons) == [not_ours] * 3 + ["no JSON"] * 2
    engine.dispose()
