"""The log reader asks what it is asked, whatever the moment."""

import asyncio
from typing import Any, Self, cast

import redis.asyncio

from keepstream.client.log_reader import CONNECTIONS, LogReader


class Commands:
    """Answers all round trips when the test says so, in one moment: what a socket does is not what is tested here."""

    def __init__(self) -> None:
        self.answers: list[asyncio.Future[None]] = []

    def pipeline(self, *, transaction: bool) -> "Pipeline":
        return Pipeline(self)


class Pipeline:
    """A round trip."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._asked = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def xrange(self, *_: object, **__: object) -> None:
        self._asked += 1

    async def execute(self, **_: Any) -> list[list[Any]]:
        answer = asyncio.get_running_loop().create_future()
        self._commands.answers.append(answer)
        await answer
        return [[]] * self._asked


async def settle() -> None:
    """Let everything happen that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_is_asked_while_the_readers_end_is_asked() -> None:
    """All connections have just read their last answer, and a follower asks before the loop goes on."""
    commands = Commands()
    reader = LogReader(cast("redis.asyncio.Redis", commands))
    first = []
    for number in range(CONNECTIONS):
        first.append(asyncio.create_task(reader.read(f"log-{number}", None)))
        await settle()
    answers, commands.answers = commands.answers, []
    came = asyncio.get_running_loop().create_future()

    async def ask_then() -> list[Any]:
        await came
        return await reader.read("one more", None)

    late = asyncio.create_task(ask_then())
    await asyncio.sleep(0)
    for each in (*answers, came):
        each.set_result(None)
    await asyncio.gather(*first)
    await settle()
    assert len(commands.answers) == 1, "nobody asks for it"
    commands.answers[0].set_result(None)
    assert await late == []
    await reader.close()
