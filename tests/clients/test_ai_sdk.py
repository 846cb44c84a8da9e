"""The AI SDK's own chat, as `useChat` has it, at real gateways: the message it shows in the end is the row's answer.

Version 7 knows how to drop a failed attempt's text; version 6 is told of an error, and resumes.
"""

import itertools
from typing import Any, Final

import pytest

from keepstream.results import CompletionResult, JobStatus
from tests import node
from tests.cluster import Cluster
from tests.gateways import GatewayProcess, make_key, start_gateway

NEWEST: Final = "ai"
OLDER: Final = "ai6"
BOTH: Final = pytest.mark.parametrize("package", [NEWEST, OLDER])
_NUMBERS: Final = itertools.count(1)


class Page:
    """A page with a chat."""

    def __init__(self, cluster: Cluster, package: str, *gateways: GatewayProcess, chat: str | None = None) -> None:
        self.chat = chat or f"chat {next(_NUMBERS)}/ä?&"
        self._cluster = cluster
        self._key = make_key(cluster)
        self._told: dict[str, Any] = {
            "package": package,
            "apis": [f"http://127.0.0.1:{gateway.port}" for gateway in gateways],
            "headers": {"Authorization": f"Bearer {self._key}"},
            "chat": self.chat,
        }

    def told(self, *actions: list[Any], script: dict[str, Any] | None = None, **told: Any) -> dict[str, Any]:
        """What ``chat.mjs`` is told, so that it does something in the chat."""
        body = {"model": "scripted-1", "script": {"key": self.chat, **(script or {})}}
        return {**self._told, "body": body, "actions": actions, **told}

    def do(self, *actions: list[Any], **told: Any) -> dict[str, Any]:
        """Do something in the chat, and return what it is then."""
        (end,) = node.run("chat.mjs", self.told(*actions, **told))
        assert isinstance(end, dict)
        return end

    def rows(self) -> list[CompletionResult]:
        """The chat's jobs, the oldest first."""
        page = self._cluster.client.list(metadata={"chat": self.chat})
        return [self._cluster.wait_for(job.id) for job in reversed(page)]


@pytest.fixture(scope="module")
def gateway(cluster: Cluster) -> GatewayProcess:
    return start_gateway(cluster)


@pytest.fixture(scope="module")
def gateways(cluster: Cluster, gateway: GatewayProcess) -> list[GatewayProcess]:
    return [gateway, start_gateway(cluster)]


@pytest.fixture(scope="module")
def older_gateways(cluster: Cluster) -> list[GatewayProcess]:
    """Two that are set for older versions."""
    return [start_gateway(cluster, chat_retry="error") for _ in range(2)]


def send(text: str = "Tell me something.") -> list[Any]:
    return ["send", {"text": text}]


def texts(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def kinds(message: dict[str, Any]) -> list[str]:
    return [part["type"] for part in message["parts"]]


def assert_is_answer(message: dict[str, Any], row: CompletionResult) -> None:
    """The message shows exactly the stored answer, and all of its parts are complete."""
    assert row.status is JobStatus.COMPLETED
    assert texts(message) == row.text
    assert "".join(part["text"] for part in message["parts"] if part["type"] == "reasoning") == "".join(
        choice.reasoning for choice in row.choices
    )
    assert {part.get("state") for part in message["parts"] if part["type"] in {"text", "reasoning"}} <= {"done"}
    assert message["metadata"]["keepstream"]["job"] == row.id


@BOTH
def test_a_message_is_answered(any_cluster: Cluster, package: str) -> None:
    page = Page(any_cluster, package, start_gateway(any_cluster))
    end = page.do(
        send(), send("And more?"), script={"reasoning": "Let me think. ", "text": "It is so. Grüße, 你好 🌊!"}
    )
    assert (end["status"], end["error"], end["statuses"]) == ("ready", None, [200, 200])
    assert [message["role"] for message in end["messages"]] == ["user", "assistant"] * 2
    first, second = page.rows()
    for message, row in zip(end["messages"][1::2], (first, second), strict=True):
        assert message["id"] == row.id
        assert kinds(message) == ["step-start", "reasoning", "text"]
        assert_is_answer(message, row)
    usage = end["messages"][1]["metadata"]["keepstream"]["usage"]
    assert first.usage is not None
    assert usage["total_tokens"] == first.usage.total_tokens
    assert [each["finishReason"] for each in end["ends"]] == ["stop", "stop"]
    assert second.request is not None
    assert [message["role"] for message in second.request["messages"]] == ["user", "assistant", "user"]
    assert second.request["messages"][1]["content"] == first.text
    assert len(end["shown"]) > 4  # it came piece by piece


@BOTH
def test_a_connection_that_is_cut_at_any_chunk_is_resumed_at_another_gateway(
    cluster: Cluster, gateways: list[GatewayProcess], package: str
) -> None:
    script = {"reasoning": "Hm. ", "text": "one two three four"}
    for cut in range(12):
        page = Page(cluster, package, *gateways)
        end = page.do(send(), ["insist"], script=script, cuts=[cut, cut + 1])
        assert (end["status"], end["error"]) == ("ready", None), (cut, end)
        (row,) = page.rows()
        assert [message["role"] for message in end["messages"]] == ["user", "assistant"], (cut, end["messages"])
        assert_is_answer(end["messages"][1], row)
        assert kinds(end["messages"][1]) == ["step-start", "reasoning", "text"]
        assert row.attempts[0].number == len(row.attempts) == 1


@BOTH
def test_a_page_that_is_opened_anew_gets_the_whole_answer(
    cluster: Cluster, gateways: list[GatewayProcess], package: str
) -> None:
    page = Page(cluster, package, *gateways)
    begun = page.do(send(), script={"deltas": 40, "rate": 40}, cuts=[8])
    assert begun["status"] == "error"
    assert begun["ends"][0]["isDisconnect"]
    end = page.do(["resume"], messages=begun["messages"][:1])
    (row,) = page.rows()
    assert_is_answer(end["messages"][1], row)
    # And once more, with the answer in the page already: the same message, not another one.
    again = page.do(["resume"], messages=end["messages"])
    assert again["messages"] == end["messages"]


def test_a_gateway_that_is_killed_loses_nothing(cluster: Cluster, gateway: GatewayProcess) -> None:
    mortal = start_gateway(cluster)
    page = Page(cluster, NEWEST, mortal, gateway)
    with node.Running("chat.mjs", page.told(send(), ["insist"], script={"deltas": 60, "rate": 30})) as running:
        cluster.wait_for_deltas(page.chat, 5)
        mortal.kill()
        (end,) = running.finish()
    (row,) = page.rows()
    assert end["status"] == "ready"
    assert end["statuses"][0] == 200
    assert_is_answer(end["messages"][1], row)


def test_a_gateway_that_stops_lets_the_page_go_on_elsewhere(cluster: Cluster, gateway: GatewayProcess) -> None:
    leaving = start_gateway(cluster)
    page = Page(cluster, NEWEST, leaving, gateway)
    with node.Running("chat.mjs", page.told(send(), ["insist"], script={"deltas": 60, "rate": 30})) as running:
        cluster.wait_for_deltas(page.chat, 5)
        leaving.stop()
        (end,) = running.finish()
    (row,) = page.rows()
    assert end["ends"][0]["isError"]  # a clean end would have been taken for the answer's
    assert_is_answer(end["messages"][1], row)


def test_a_failed_attempts_text_is_dropped(cluster: Cluster, gateway: GatewayProcess) -> None:
    page = Page(cluster, NEWEST, gateway)
    script = {"text": "alpha beta gamma delta", "reasoning": "First this. ", "faults": [{"kind": "cut", "after": 4}]}
    end = page.do(send(), script=script)
    assert (end["status"], end["error"], end["statuses"]) == ("ready", None, [200])
    (row,) = page.rows()
    assert [attempt.outcome for attempt in row.attempts] == ["failed", "finished"]
    assert_is_answer(end["messages"][1], row)
    begun = next(number for number, text in enumerate(end["shown"]) if text)
    assert "" in end["shown"][begun:]  # it was shown, and dropped
    assert kinds(end["messages"][1]) == ["step-start", "reasoning", "text"]


def test_an_older_version_resumes_after_a_failed_attempt(
    cluster: Cluster, older_gateways: list[GatewayProcess]
) -> None:
    page = Page(cluster, OLDER, *older_gateways)
    script = {"text": "alpha beta gamma delta", "reasoning": "First this. ", "faults": [{"kind": "cut", "after": 4}]}
    begun = page.do(send(), script=script)
    assert begun["status"] == "error"
    assert "resume the stream" in begun["error"]
    page = Page(cluster, OLDER, *older_gateways)
    end = page.do(send(), ["insist"], script=script)
    assert (end["status"], end["error"]) == ("ready", None)
    (row,) = page.rows()
    assert len(row.attempts) == 2
    assert_is_answer(end["messages"][1], row)
    assert kinds(end["messages"][1]) == ["step-start", "reasoning", "text"]


@BOTH
def test_an_answer_is_stopped_and_keeps_its_text(cluster: Cluster, gateway: GatewayProcess, package: str) -> None:
    page = Page(cluster, package, gateway)
    end = page.do(["sendAndStop", {"text": "Tell me a lot."}], script={"deltas": 2000, "rate": 50})
    (row,) = page.rows()
    assert row.status is JobStatus.CANCELLED
    assert (end["status"], end["error"], end["statuses"]) == ("ready", None, [200, 200])
    assert len(texts(end["messages"][1])) > 0
    assert texts(end["messages"][1]) == row.text
    assert page.do(["resume"], messages=end["messages"])["messages"][1]["parts"] == end["messages"][1]["parts"]


@BOTH
def test_tool_calls_are_answered_by_the_page(any_cluster: Cluster, package: str) -> None:
    """The message goes on; the request for its next step has what the provider wants back; a replay has it all."""
    gateways = [start_gateway(any_cluster), start_gateway(any_cluster)]
    page = Page(any_cluster, package, *gateways)
    calls = {
        "text": "Let me look.",
        "reasoning": "The weather, then. ",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}],
    }
    first = page.do(send("Is it raining?"), script=calls)
    assert [call["toolName"] for call in first["calls"]] == ["weather"]
    assert first["calls"][0]["input"] == {"city": "Zürich", "days": 2}
    assert first["ends"][0]["finishReason"] == "tool-calls"
    message = first["messages"][1]
    assert kinds(message) == ["step-start", "reasoning", "text", "tool-weather"]
    assert message["parts"][-1]["state"] == "input-available"

    answer = ["answer", "weather", {"rain": True, "mm": [1, 2.5]}]
    end = page.do(answer, messages=first["messages"], continues=True, script={"text": "Yes, it rains."}, cuts=[4])
    assert end["status"] == "error"
    end = page.do(["resume"], messages=end["messages"])
    asked, answered = page.rows()
    assert [message["role"] for message in end["messages"]] == ["user", "assistant"]
    whole = end["messages"][1]
    assert whole["id"] == asked.id
    assert kinds(whole) == [*kinds(message), "step-start", "text"]
    assert next(part for part in whole["parts"] if part["type"] == "tool-weather")["output"] == answer[2]
    assert texts(whole) == asked.text + answered.text
    assert answered.request is not None
    sent = answered.request["messages"]
    assert sent[1] == asked.assistant_message()
    assert sent[1]["reasoning_content"] == "The weather, then. "
    assert sent[2]["tool_call_id"] == asked.tool_calls[0].id
    assert sent[2]["content"] == '{"rain": true, "mm": [1, 2.5]}'


@BOTH
def test_an_error_is_told_and_the_question_can_be_asked_again(
    cluster: Cluster, gateway: GatewayProcess, package: str
) -> None:
    page = Page(cluster, package, gateway)
    refusal = {"faults": [{"kind": "status", "status": 400}]}
    end = page.do(send(), script=refusal)
    (failed,) = page.rows()
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert (end["status"], end["error"]) == ("error", failed.error.message)
    again = page.do(["regenerate"], messages=end["messages"], script={"text": "Now it is well."})
    _, row = page.rows()
    assert_is_answer(again["messages"][-1], row)


@BOTH
def test_an_answer_is_written_anew(cluster: Cluster, gateway: GatewayProcess, package: str) -> None:
    page = Page(cluster, package, gateway)
    first = page.do(send(), script={"text": "One way."})
    again = page.do(["regenerate"], messages=first["messages"], script={"text": "Another way."})
    assert [texts(message) for message in again["messages"]] == ["Tell me something.", "Another way."]
    assert [row.text for row in page.rows()] == ["One way.", "Another way."]


def test_nothing_is_resumed_where_nothing_is_active(cluster: Cluster) -> None:
    brief = start_gateway(cluster, chat_replay=0.001)
    page = Page(cluster, NEWEST, brief)
    assert page.do(["resume"])["statuses"] == [204]
    done = page.do(send(), script={"text": "Short."})
    page.rows()
    after = page.do(["resume"], messages=done["messages"])
    assert after["statuses"] == [204]
    assert after["messages"] == done["messages"]
