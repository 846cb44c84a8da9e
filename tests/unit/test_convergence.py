"""Whatever happens on the way, what a follower holds at the end is what the accumulator holds.

The reader, the accumulator and the publication are the worker's own; Redis is a model of the script,
the connection and the followers are in the hands of hypothesis.
"""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from keepstream.events import is_terminal, parse_event
from keepstream.names import EventId, parse_event_id
from keepstream.results import Usage, output_sha256
from keepstream.transcript import Transcript
from keepstream_worker.events.closing_events import finish_reasons, snapshot_fields
from keepstream_worker.events.publication import Publication
from keepstream_worker.providers.stream import StreamReader
from tests.log_model import LogModel

LIMIT = 300  # bytes that a publication may hold while Redis is away: little, so that shedding is met often

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    ["\ud83c", "\udf0a", "a\x00b"]  # halves of a pair, and what may not be stored
)
content = st.fixed_dictionaries({"content": texts})
reasoning = st.fixed_dictionaries({"reasoning_content": texts})
tool_call = st.builds(
    lambda index, name, arguments: {
        "tool_calls": [{"index": index, "id": f"call_{index}", "function": {"name": name, "arguments": arguments}}]
    },
    st.integers(0, 2),
    st.sampled_from(["look", "search"]),
    st.sampled_from(["", "{", '"a":', "1", "}"]),
)
chunks = st.tuples(st.integers(0, 1), content | content | reasoning | tool_call)

steps = st.one_of(
    st.tuples(st.just("chunks"), st.lists(chunks, min_size=1, max_size=5)),
    st.just(("flush",)),
    st.just(("flush",)),
    st.just(("the answer is lost",)),
    st.just(("the command is lost",)),
    st.just(("the command is late",)),
    st.tuples(st.just("a late command arrives"), st.integers(0, 5)),
    st.tuples(st.just("Redis loses entries"), st.sampled_from([1, 3, 10_000])),
    st.just(("Redis is emptied in passing",)),
    st.just(("Redis is away for long",)),
    st.just(("the provider fails",)),
    st.tuples(st.just("a follower misses messages"), st.integers(1, 4)),
)


class StubOutbox:
    """Stands in for the publisher: the schedule decides what is sent, and when."""

    prefix = "keepstream"
    merge_above = 8

    def __init__(self) -> None:
        self.epoch = 1

    def mark_dirty(self, publication: Publication) -> None:
        """Nothing is sent but by the schedule."""

    def discard(self, publication: Publication) -> None:
        """Nothing is queued here."""


class World:
    """A job, its worker, the connection to Redis, and one follower."""

    def __init__(self) -> None:
        self.outbox = StubOutbox()
        self.redis = LogModel()
        self.late: list[bytes] = []
        self.follower = Transcript()
        self.ends = 0
        self.attempt = 0
        self.deaf = 0
        self.position = 0
        self.begin("first")

    def begin(self, reason: str) -> None:
        """Begin an attempt; what the one before had pending stays unsent, or is late."""
        self.attempt += 1
        self.finished = False
        self.reader = StreamReader(call_seed="job-1")
        self.publication = Publication(
            self.outbox,
            "default",
            "job-1",
            self.attempt,
            self.snapshot,
            on_fenced=lambda: None,
            on_cancel=lambda: None,
        )
        self.publication.send("attempt.started", {"model": "m", "provider": "p", "reason": reason})

    def snapshot(self) -> dict[str, Any]:
        return snapshot_fields(self.reader.output().choices, Usage(), finished=self.finished)

    # -- what may happen --

    def chunks(self, given: list[tuple[int, dict[str, Any]]]) -> None:
        for choice, delta in given:
            chunk = {"id": "c", "model": "m", "choices": [{"index": choice, "delta": delta, "finish_reason": None}]}
            if deltas := self.reader.feed(b"data: %b\n\n" % json.dumps(chunk).encode()):
                self.publication.send_deltas(deltas)

    def flush(self) -> None:
        if self.publication._pending:
            command, covered = self.publication.next_call(self.outbox.epoch, b"1000")
            self.publication.handle_answer(self.redis.execute(command), covered, self.outbox.epoch)
            self.deliver()

    def the_answer_is_lost(self) -> None:
        if self.publication._pending:
            self.redis.execute(self.publication.next_call(self.outbox.epoch, b"1000")[0])
            self.deliver()
        self.reconnect()

    def the_command_is_lost(self) -> None:
        self.reconnect()

    def the_command_is_late(self) -> None:
        if self.publication._pending:
            self.late.append(self.publication.next_call(self.outbox.epoch, b"1000")[0])
        self.reconnect()

    def a_late_command_arrives(self, which: int) -> None:
        if self.late:
            self.redis.execute(self.late.pop(which % len(self.late)))
            self.deliver()

    def redis_loses_entries(self, entries: int) -> None:
        self.redis.lose(entries)
        self.late.clear()  # they were on connections that are gone
        self.reconnect()

    def redis_is_emptied_in_passing(self) -> None:
        self.redis.lose(len(self.redis.log))

    def redis_is_away_for_long(self) -> None:
        self.reconnect()
        self.publication.shed_buffer(0)

    def the_provider_fails(self) -> None:
        self.reader.finish()
        if self.reader.final_deltas:
            self.publication.send_deltas(self.reader.final_deltas)
        error = {"code": "connection", "message": "cut"}
        self.publication.send("attempt.failed", {"error": error, "retryable": True, "retry_in": 0.1})
        self.flush()
        self.begin("retry")

    def a_follower_misses_messages(self, count: int) -> None:
        self.deaf += count

    def reconnect(self) -> None:
        self.outbox.epoch += 1
        self.publication.shed_buffer(LIMIT)

    # -- the follower --

    def deliver(self) -> None:
        """The follower hears what was published; if something is missing, it reads the log."""
        for event in self.redis.heard[self.position :]:
            if self.deaf:
                self.deaf -= 1
            else:
                self.apply(event)
        self.position = len(self.redis.heard)
        if self.follower.behind:
            self.read_log()

    def read_log(self) -> None:
        for _, event in self.redis.log:
            self.apply(event)

    def apply(self, text: bytes) -> None:
        event = parse_event(text)
        if self.follower.apply(event):
            self.ends += is_terminal(event)

    # -- the end --

    def end(self, status: str) -> None:
        """The stream ends; everything that is pending goes out, whatever that takes."""
        if status == "completed":
            self.chunks([(0, {"content": "."}), (1, {"content": "."})])
        self.reader.finish()
        if self.reader.final_deltas:
            self.publication.send_deltas(self.reader.final_deltas)
        choices = self.reader.output().choices
        if status == "completed":
            self.finished = True
            self.publication.send("attempt.finished", {"finish_reasons": finish_reasons(choices), "usage": None})
        fields = {
            "status": status,
            "finish_reasons": finish_reasons(choices),
            "attempts": self.attempt,
            "output_sha256": output_sha256(choice.content for choice in choices),
        }
        self.told_end = (f"job.{status}", self.publication.next_id(), fields)
        self.publication.send(f"job.{status}", fields)

    def settle_everything(self) -> None:
        for _ in range(200):
            if not self.publication._pending:
                break
            self.flush()
        self.deaf = 0
        self.deliver()
        self.read_log()
        if self.follower.terminal is None:  # the log is lost once more; the row, committed before the end, answers
            last = self.publication.last_n
            self.apply(self.publication._encode("snapshot", f"{self.attempt}-{last - 1}", self.snapshot()))
            self.apply(self.publication._encode(*self.told_end))


def act(world: World, step: tuple[Any, ...]) -> None:
    name, *arguments = step
    action: Callable[..., None] = getattr(world, name.replace(" ", "_").lower())
    action(*arguments)


def check_log(log: list[tuple[EventId, bytes]]) -> None:
    """Ids rise without gaps within an attempt, but for snapshots; each event has the id of its entry."""
    last = EventId(0, 0)
    for here, text in log:
        event = json.loads(text)
        assert parse_event_id(event["id"]) == here
        expected = EventId(here.attempt, last.n + 1 if here.attempt == last.attempt else 1)
        assert here > last
        assert here == expected or event["type"] == "snapshot"
        last = here


@settings(max_examples=200, deadline=None)
@given(
    st.lists(steps, max_size=30),
    st.sampled_from(["completed", "cancelled"]),
    st.lists(steps.filter(lambda step: step[0] not in {"chunks", "the provider fails"}), max_size=6),
)
def test_follower_holds_what_the_accumulator_holds(
    schedule: list[tuple[Any, ...]], status: str, endgame: list[tuple[Any, ...]]
) -> None:
    world = World()
    for step in schedule:
        act(world, step)
    world.end(status)
    for step in endgame:
        act(world, step)
    world.settle_everything()

    output = world.reader.output().choices
    held = {choice.index: choice for choice in world.follower.choices}
    assert {index: choice.content for index, choice in held.items()} == {
        choice.index: choice.content for choice in output
    }
    for choice in output:
        assert held[choice.index].reasoning == choice.reasoning
        assert [(c.id, c.name, c.arguments) for c in held[choice.index].tool_calls] == [
            (c.id, c.name, c.arguments) for c in choice.tool_calls
        ]
    assert world.ends == 1
    assert world.follower.terminal is not None
    assert world.follower.sha256() == world.follower.terminal.output_sha256
    # An end that everybody has heard may be lost by Redis afterwards; else the log has it, once and last.
    check_log(world.redis.log)
    ends = [here for here, text in world.redis.log if json.loads(text)["type"].startswith("job.")]
    assert ends in ([], [world.redis.last])
