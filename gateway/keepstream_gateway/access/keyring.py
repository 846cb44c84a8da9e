"""The keyring: API keys as the table has them, remembered for some seconds.

In: ids of keys.  Out: the stored keys, by one query per key and some seconds however many requests ask.
"""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from keepstream.client import api_keys
from keepstream.client.api_keys import StoredKey
from keepstream.client.database import ClientDatabase
from keepstream.errors import KeepstreamError

_MOST: Final = 10_000  #: Keys, known and unknown, that are remembered.
_UNKNOWN_SECONDS: Final = 1.0  #: For which an id is known to be unknown; a new key works that soon.
_THREADS: Final = 2


class Keyring:
    """The stored keys.

    Args:
        database_url: Where they are.
        seconds: For which a key is remembered; one that was revoked works for so long at most.
    """

    def __init__(self, database_url: str, seconds: float) -> None:
        self._database = ClientDatabase(database_url)
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keepstream-keys")
        self._known: OrderedDict[str, tuple[float, StoredKey | None]] = OrderedDict()
        self._asked: dict[str, asyncio.Task[StoredKey | None]] = {}

    async def find(self, key_id: str) -> StoredKey | None:
        """Return a key that has not been revoked; None: there is none of this id.

        Raises:
            StoreUnavailableError: the database did not answer.
        """
        if not api_keys.is_id(key_id):
            return None  # anybody may write anything into a token; it is not worth a query, nor may all of it be in one
        loop = asyncio.get_running_loop()
        known = self._known.get(key_id)
        if known is not None and loop.time() < known[0]:
            return known[1]
        asking = self._asked.get(key_id)
        if asking is None:
            asking = self._asked[key_id] = loop.create_task(self._ask(key_id))
            asking.add_done_callback(lambda _: self._asked.pop(key_id, None))
        return await asyncio.shield(asking)  # whoever leaves does not take the answer from the others

    async def knows(self, key_id: str) -> bool:
        """Whether there is a key of this id that has not been revoked; raises as ``find``."""
        return await self.find(key_id) is not None

    async def database_answers(self) -> bool:
        """Whether the database answers now."""

        def look() -> None:
            with self._database.transaction() as connection:
                api_keys.find(connection, "")

        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, look)
        except KeepstreamError:
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False)
        self._database.close()

    async def _ask(self, key_id: str) -> StoredKey | None:
        def read() -> StoredKey | None:
            with self._database.transaction() as connection:
                return api_keys.find(connection, key_id)

        loop = asyncio.get_running_loop()
        asked_at = loop.time()  # what is revoked from now on may not be seen by the query
        found = await loop.run_in_executor(self._threads, read)
        self._known[key_id] = (asked_at + (self._seconds if found else _UNKNOWN_SECONDS), found)
        self._known.move_to_end(key_id)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return found
