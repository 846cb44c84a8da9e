"""The keyring: API keys as the table has them, remembered for some seconds.

In: ids of keys.  Out: the stored keys, by few queries however many requests ask.

Whoever has no key may ask for any number of ids. So one query at a time asks for many, those that were keys before
first, and after one that has met an unknown id there is a pause. What such requests cost is the same however many come,
and those with keys wait for a moment at most.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from keepstream.client import api_keys
from keepstream.client.api_keys import StoredKey
from keepstream.client.database import ClientDatabase
from keepstream.errors import KeepstreamError, StoreUnavailableError

_MOST: Final = 10_000  #: Keys that are remembered, and as many unknown ids.
_UNKNOWN_SECONDS: Final = 1.0  #: For which an id is known to be unknown; a new key works that soon.
_TOGETHER: Final = 200  #: Ids of one query.
_PAUSE: Final = 0.05  #: Seconds between two queries, if there was an unknown id in the first.
_MOST_ASKED: Final = 2000  #: Ids that were no keys before and wait for a query.

_Answer = StoredKey | None | Exception


class Keyring:
    """The stored keys.

    Args:
        database_url: Where they are.
        seconds: For which a key is remembered; one that was revoked works for so long at most.
    """

    def __init__(self, database_url: str, seconds: float) -> None:
        self._database = ClientDatabase(database_url)
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="keepstream-keys")  # for keys, and for readiness
        self._known: OrderedDict[str, tuple[float, StoredKey]] = OrderedDict()  # until when they need not be looked at
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._asked: dict[str, asyncio.Future[_Answer]] = {}  # by id, also while the query is under way
        self._waiting: dict[bool, list[str]] = {True: [], False: []}  # by whether they were keys before
        self._reader: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> StoredKey | None:
        """Return a key that has not been revoked; None: there is none of this id.

        Raises:
            StoreUnavailableError: the database did not answer, or too many unknown ids are asked for.
        """
        if not api_keys.is_id(key_id):
            return None  # anybody may write anything into a token; it is not worth a query, nor may all of it be in one
        now = asyncio.get_running_loop().time()
        known = self._known.get(key_id)
        if known is not None and now < known[0]:
            return known[1]
        if now < self._unknown.get(key_id, 0.0):
            return None
        found = await asyncio.shield(self._ask(key_id))  # whoever leaves does not take the answer from the others
        if isinstance(found, Exception):
            raise found.with_traceback(None)  # else it would grow with each request that raises it
        return found

    async def knows(self, key_id: str) -> bool:
        """Whether there is a key of this id that has not been revoked; raises as ``find``."""
        return await self.find(key_id) is not None

    async def database_answers(self) -> bool:
        """Whether the database answers now."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._read, [])
        except KeepstreamError:
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False)
        self._database.close()

    def _ask(self, key_id: str) -> "asyncio.Future[_Answer]":
        """Return what the next query will say of an id, or the present one."""
        if key_id in self._asked:
            return self._asked[key_id]
        was_key = key_id in self._known
        if not was_key and len(self._waiting[False]) >= _MOST_ASKED:
            raise StoreUnavailableError("too many unknown API keys are looked up at once")
        loop = asyncio.get_running_loop()
        answer = self._asked[key_id] = loop.create_future()
        self._waiting[was_key].append(key_id)
        if self._reader is None or self._reader.done():
            self._reader = loop.create_task(self._read_all(), name="keys")
        return answer

    async def _read_all(self) -> None:
        """Answer all that is asked."""
        loop = asyncio.get_running_loop()
        while sent := self._take():
            asked_at = loop.time()  # what is revoked from now on may not be seen by the query
            try:
                found = await loop.run_in_executor(self._threads, self._read, sent)
            except Exception as error:  # noqa: BLE001  # each who asked gets it, and says what it means
                for key_id in sent:
                    self._asked.pop(key_id).set_result(error)
                continue
            for key_id in sent:
                self._remember(key_id, found.get(key_id), asked_at)
                self._asked.pop(key_id).set_result(found.get(key_id))
            if len(found) < len(sent):
                await asyncio.sleep(_PAUSE)

    def _take(self) -> list[str]:
        sent: list[str] = []
        for waiting in (self._waiting[True], self._waiting[False]):
            room = _TOGETHER - len(sent)
            sent += waiting[:room]
            del waiting[:room]
        return sent

    def _read(self, key_ids: list[str]) -> dict[str, StoredKey]:
        with self._database.transaction() as connection:
            return api_keys.find_all(connection, key_ids)

    def _remember(self, key_id: str, found: StoredKey | None, asked_at: float) -> None:
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        if found is not None:
            self._known[key_id] = (asked_at + self._seconds, found)
        else:
            self._unknown[key_id] = asked_at + _UNKNOWN_SECONDS
        for remembered in (self._known, self._unknown):
            if len(remembered) > _MOST:
                remembered.popitem(last=False)
