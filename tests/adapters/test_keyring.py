"""The keyring asks little, whoever asks it, and keeps those with keys from waiting for those without."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event

from keepstream import tables
from keepstream.client import api_keys
from keepstream.client.api_keys import StoredKey
from keepstream.client.database import ClientDatabase
from keepstream.errors import StoreUnavailableError
from keepstream.names import Right
from keepstream_gateway.access import keyring as module
from keepstream_gateway.access.keyring import Keyring


class Asking:
    """A keyring, and what it asks the database."""

    def __init__(self, url: str, seconds: float) -> None:
        self.keyring = Keyring(url, seconds)
        self.asked: list[str] = []  #: The parameters of each statement.
        engine = self.keyring._database._engine.get()
        event.listen(engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "api_keys" in statement:
            self.asked.append(str(parameters))


def make_key(url: str) -> StoredKey:
    database = ClientDatabase(url)
    with database.transaction() as connection:
        stored, _ = api_keys.create(connection, "default", "test", frozenset({Right.API}))
    database.close()
    return stored


def unknown(count: int) -> list[str]:
    return [f"{number:012x}" for number in range(count)]


@pytest.fixture
def url(database_url: str) -> str:
    engine = create_engine(database_url)
    tables.metadata.create_all(engine)
    engine.dispose()
    return database_url


@pytest.fixture
async def asking(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Asking]:
    asking = Asking(url, getattr(request, "param", 600.0))
    yield asking
    await asking.keyring.close()


async def test_many_ids_are_asked_for_together(asking: Asking, url: str) -> None:
    stored = make_key(url)
    found = await asyncio.gather(*map(asking.keyring.find, [*unknown(1000), stored.id]))
    assert found == [None] * 1000 + [stored]
    assert len(asking.asked) <= 7
    asking.asked.clear()
    assert await asking.keyring.find(stored.id) == stored
    assert asking.asked == []


async def test_after_an_unknown_id_there_is_a_pause(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever asks for one after the other has a query for each."""
    monkeypatch.setattr(module, "_PAUSE", 3600.0)
    first, *others = unknown(30)
    assert await asking.keyring.find(first) is None
    waiting = [asyncio.create_task(asking.keyring.find(each)) for each in others]
    assert await asking.keyring.database_answers()
    assert len(asking.asked) == 2, "of which one is about readiness"
    for task in waiting:
        task.cancel()
    reader = asking.keyring._reader
    assert reader is not None
    reader.cancel()
    await asyncio.wait([reader, *waiting])


async def test_too_many_unknown_ids_are_refused_and_no_key(
    asking: Asking, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_ASKED", 300)
    monkeypatch.setattr(module, "_MOST", 10)
    stored = make_key(url)
    assert await asking.keyring.find(stored.id) == stored
    answers = await asyncio.gather(*map(asking.keyring.find, unknown(1000)), return_exceptions=True)
    refused = [answer for answer in answers if answer is not None]
    assert len(refused) == 700
    assert all(isinstance(answer, StoreUnavailableError) for answer in refused)
    asking.asked.clear()
    assert await asking.keyring.find(stored.id) == stored  # nor is it forgotten
    assert asking.asked == []


@pytest.mark.parametrize("asking", [0.0], indirect=True)
async def test_what_was_a_key_before_is_looked_up_first(asking: Asking, url: str) -> None:
    stored = make_key(url)
    assert await asking.keyring.find(stored.id) == stored
    asking.asked.clear()
    found = await asyncio.gather(*map(asking.keyring.find, [*unknown(500), stored.id]))
    assert found[-1] == stored
    assert stored.id in asking.asked[0]
    database = ClientDatabase(url)
    with database.transaction() as connection:
        api_keys.revoke(connection, stored.id)
    database.close()
    assert await asking.keyring.find(stored.id) is None
