"""The servers: other people's programs that stream answers in either dialect, each configured with what to say.

In: the directory of their executables, from ``make interop``.
Out: running processes, and the cases that each can play.
"""

import http.client
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from typing_extensions import override

from keepstream_worker.dev_stack.embedded import EmbeddedProcess, free_port

TEXT: Final = (
    "Grüße, ¡saludos!, 你好, こんにちは, שלום and 🌊 👩‍👩‍👧 from a server that somebody else wrote: é and e\u0301, "
    "a “quotation”, a \\ backslash, a \u00a0 hard space, and a line of its own:\nthat was it."
)
CALLS: Final[list[dict[str, Any]]] = [
    {"name": "get_weather", "arguments": {"city": "Zürich 🌊", "days": 3, "units": ["°C", "mm"]}},
    {"name": "get_time", "arguments": {"zone": "Asia/東京"}},
]
TOOLS: Final = [
    {"type": "function", "function": {"name": call["name"], "parameters": {"type": "object"}}} for call in CALLS
]
ASK_FOR_TEXT: Final = [{"role": "user", "content": "Say something in many languages: Grüße!"}]
ASK_FOR_CALLS: Final = [{"role": "user", "content": "What is the weather in Zürich?"}]
#: A turn after the calls: what the tools said goes back with them.
ASK_AFTER_CALLS: Final[list[dict[str, Any]]] = [
    *ASK_FOR_CALLS,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for number, call in enumerate(CALLS)
        ],
    },
    *[{"role": "tool", "tool_call_id": f"call_{number}", "content": "12 °C"} for number in range(len(CALLS))],
    *ASK_FOR_TEXT,
]
REASONING: Final = "They want greetings → I collect some: Grüße, 你好, 🌊."


@dataclass(frozen=True, slots=True)
class Case:
    """One completion and the configured answer; whatever else the server sends is up to it."""

    name: str
    model: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ("",)  #: By choice.
    reasoning: str = ""  #: Of the first choice.
    calls: Sequence[dict[str, Any]] = ()  #: Of the first choice.
    api: str = "chat"  #: The dialect in which the server is asked.


def _by_responses(model: str, reasoning: str = "") -> tuple[Case, ...]:
    """Return the cases of a server that is asked by the Responses API."""
    return (
        Case("text", model, ASK_FOR_TEXT, texts=(TEXT,), reasoning=reasoning, api="responses"),
        Case("two tool calls", model, ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS, api="responses"),
        Case("text after calls", model, ASK_AFTER_CALLS, texts=(TEXT,), reasoning=reasoning, api="responses"),
    )


class IndependentServer(EmbeddedProcess):
    """A server from a package registry."""

    start_timeout = 240.0  #: Seconds; LiteLLM imports half a gigabyte.
    program: ClassVar[str]
    place: ClassVar[str] = "bin"  #: The program's directory in the environment.
    key: ClassVar[str] = ""  #: The key that clients must bring, if any.
    health: ClassVar[str]  #: Path that answers 200 when the server is ready.
    cases: ClassVar[Sequence[Case]]

    def __init__(self, environment: Path) -> None:
        super().__init__(self.program)
        self.port = free_port()
        self._executable = environment.absolute() / self.place / self.program

    @property
    def base_url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"http://127.0.0.1:{self.port}/v1"

    @override
    def _options(self) -> dict[str, Any]:
        return {"cwd": self.directory}

    @override
    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", self.health)
            return connection.getresponse().status == 200
        except http.client.HTTPException:
            return False
        finally:
            connection.close()

    def _write_config(self, content: dict[str, Any]) -> Path:
        file = self.directory / "config.json"  # JSON is YAML, too
        file.write_text(json.dumps(content, ensure_ascii=False))
        return file


class FakeLLM(IndependentServer):
    """fakellm: streams words and pieces of tool arguments; reports no usage."""

    program = "fakellm"
    health = "/_fakellm/stats"
    cases = (
        Case("text", "fake", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two tool calls", "fake", ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS),
    )

    @override
    def _command(self) -> list[str]:
        rules = [
            {"name": "calls", "when": {"tools_include": CALLS[0]["name"]}, "respond": {"tool_calls": CALLS}},
            {"name": "text", "when": {"messages_contain": "Grüße"}, "respond": {"content": TEXT}},
        ]
        config = self._write_config({"version": 1, "rules": rules})
        return [str(self._executable), "serve", "--port", str(self.port), "--config", str(config)]


class StubLLM(IndependentServer):
    """stubllm: gives parallel tool calls the same index, and no finish reason."""

    program = "stubllm"
    health = "/health"
    cases = (
        Case("text", "stub", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two tool calls", "stub", ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS),
    )

    @override
    def _command(self) -> list[str]:
        calls = [
            {
                "id": f"call_{number}",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for number, call in enumerate(CALLS)
        ]
        fixtures = [
            {"name": "calls", "match": {"tools_present": True}, "response": {"tool_calls": calls}},
            {"name": "text", "match": {"tools_present": False}, "response": {"content": TEXT}},
        ]
        config = self._write_config({"fixtures": fixtures})
        return [str(self._executable), "serve", "--port", str(self.port), "--fixture-file", str(config)]


class CodexRelay(IndependentServer):
    """codex-relay: the Responses API in front of a server of chat completions; it sends no indexes of parts."""

    program = "codex-relay"
    health = "/v1/models"
    cases = _by_responses("fake")

    def __init__(self, environment: Path, behind: IndependentServer) -> None:
        super().__init__(environment)
        self._behind = behind

    @override
    def _command(self) -> list[str]:
        return [str(self._executable), "--port", str(self.port), "--upstream", self._behind.base_url]


class AIMock(IndependentServer):
    """aimock, for Node: both dialects, with reasoning; it cuts texts anywhere, through surrogate pairs too."""

    program = "llmock"
    place = "node/node_modules/.bin"
    health = "/health"
    cases = (
        Case("text", "m", ASK_FOR_TEXT, texts=(TEXT,), reasoning=REASONING),
        Case("two tool calls", "m", ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS),
        *_by_responses("m", REASONING),
    )

    def __init__(self, environment: Path) -> None:
        super().__init__(environment)
        self.name = "aimock"

    @override
    def _command(self) -> list[str]:
        said = {"content": TEXT, "reasoning": REASONING, "usage": {"prompt_tokens": 11, "completion_tokens": 47}}
        fixtures = [
            {"match": {"userMessage": "weather"}, "response": {"toolCalls": CALLS}},
            {"match": {"userMessage": "Grüße"}, "response": said},
        ]
        config = self._write_config({"fixtures": fixtures})
        return [str(self._executable), "--port", str(self.port), "--fixtures", str(config), "--chunk-size", "7"]


class LiteLLM(IndependentServer):
    """LiteLLM's proxy: with answers of its own (``mock_response``), and in front of other servers.

    It cuts texts into its own pieces, counts tokens and reports usage in both cases. By the Responses API it translates
    for a server that has chat completions only (``translated``), and passes on what a server of that API says.
    """

    program = "litellm"
    key = f"sk-{secrets.token_hex(16)}"
    health = "/health/liveliness"
    cases = (
        Case("text", "own", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two choices", "own", ASK_FOR_TEXT, {"n": 2}, texts=(TEXT, TEXT)),
        Case("text from behind", "behind", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two tool calls from behind", "behind", ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS),
        *_by_responses("translated"),
    )

    def __init__(self, environment: Path, behind: IndependentServer) -> None:
        super().__init__(environment)
        self._behind = behind

    @override
    def _command(self) -> list[str]:
        routes = {
            "own": {"model": "openai/own", "api_key": "none", "mock_response": TEXT},
            "behind": {"model": "openai/fake", "api_key": "none", "api_base": self._behind.base_url},
            "translated": {"model": "deepseek/fake", "api_key": "none", "api_base": self._behind.base_url},
        }
        models = [{"model_name": name, "litellm_params": route} for name, route in routes.items()]
        config = self._write_config({"model_list": models})
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        return [str(self._executable), "--config", str(config), *address, "--telemetry", "False"]

    @override
    def _options(self) -> dict[str, Any]:
        # The list of prices comes from the package instead of the network.
        own = {"LITELLM_MASTER_KEY": self.key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        return {**super()._options(), "env": os.environ | own}
