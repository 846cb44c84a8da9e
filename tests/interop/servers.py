"""The servers: other people's programs that stream chat completions, each configured with what to say.

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


@dataclass(frozen=True, slots=True)
class Case:
    """One completion and the configured answer; whatever else the server sends is up to it."""

    name: str
    model: str
    messages: list[dict[str, Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ("",)  #: By choice.
    calls: Sequence[dict[str, Any]] = ()  #: Of the first choice.


class IndependentServer(EmbeddedProcess):
    """A server from the package registry."""

    start_timeout = 240.0  #: Seconds; LiteLLM imports half a gigabyte.
    program: ClassVar[str]
    key: ClassVar[str] = ""  #: The key that clients must bring, if any.
    health: ClassVar[str]  #: Path that answers 200 when the server is ready.
    cases: ClassVar[Sequence[Case]]

    def __init__(self, executables: Path) -> None:
        super().__init__(self.program)
        self.port = free_port()
        self._executable = executables.absolute() / self.program

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
        file = self.directory / "config.yaml"  # JSON is YAML
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


class LiteLLM(IndependentServer):
    """LiteLLM's proxy: with answers of its own (``mock_response``), and in front of another server.

    It cuts texts into its own pieces, counts tokens and reports usage in both cases.
    """

    program = "litellm"
    key = f"sk-{secrets.token_hex(16)}"
    health = "/health/liveliness"
    cases = (
        Case("text", "own", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two choices", "own", ASK_FOR_TEXT, {"n": 2}, texts=(TEXT, TEXT)),
        Case("text from behind", "behind", ASK_FOR_TEXT, texts=(TEXT,)),
        Case("two tool calls from behind", "behind", ASK_FOR_CALLS, {"tools": TOOLS}, calls=CALLS),
    )

    def __init__(self, executables: Path, behind: IndependentServer) -> None:
        super().__init__(executables)
        self._behind = behind

    @override
    def _command(self) -> list[str]:
        routes = {
            "own": {"model": "openai/own", "api_key": "none", "mock_response": TEXT},
            "behind": {"model": "openai/fake", "api_key": "none", "api_base": self._behind.base_url},
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
