"""A UI message as the AI SDK builds it from chunks: the rules of its version 7, in few lines.

In: chunks of a UI message stream.  Out: the message's parts.  A chunk that the AI SDK would throw on fails the test.
"""

from typing import Any

Chunk = dict[str, Any]


class UiMessage:
    """A message that grows."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.parts: list[dict[str, Any]] = []
        self.error: str | None = None
        self.finish_reason: str | None = None
        self.aborted = False
        self._open: dict[str, dict[str, Any]] = {}  # parts that have begun, by their ids
        self._inputs: dict[str, str] = {}  # of tool calls of this step, so far

    def apply(self, chunks: list[Chunk]) -> None:
        """Apply chunks in their order."""
        for chunk in chunks:
            assert not self.is_ended, f"{chunk} after the end"
            self._apply(chunk)

    @property
    def is_ended(self) -> bool:
        """Whether nothing may follow."""
        return self.aborted or self.error is not None or self.finish_reason is not None

    @property
    def is_whole(self) -> bool:
        """Whether every part has ended."""
        return not self._open

    def texts(self, kind: str, *, refusal: bool = False) -> str:
        """What is shown as ``text`` or ``reasoning``."""
        return "".join(
            part["text"] for part in self.parts if part["type"] == kind and part.get("refusal", False) is refusal
        )

    @property
    def calls(self) -> list[tuple[str, str, Any]]:
        """Id, name and input of each tool call."""
        return [(part["id"], part["name"], part.get("input")) for part in self.parts if part["type"] == "tool"]

    def _apply(self, chunk: Chunk) -> None:
        match chunk["type"]:
            case "start":
                self.id = chunk["messageId"]
            case "start-step":
                self.parts.append({"type": "step-start"})
            case "text-start" | "reasoning-start":
                ours = chunk.get("providerMetadata", {}).get("keepstream", {})
                part = {"type": chunk["type"].removesuffix("-start"), "text": "", "refusal": ours.get("refusal", False)}
                assert chunk["id"] not in self._open
                self._open[chunk["id"]] = part
                self.parts.append(part)
            case "text-delta" | "reasoning-delta":
                self._open[chunk["id"]]["text"] += chunk["delta"]
            case "text-end" | "reasoning-end":
                del self._open[chunk["id"]]
            case "file" | "source-url":
                self.parts.append(dict(chunk))
            case "reset-step":
                while self.parts[-1]["type"] != "step-start":
                    self.parts.pop()
                self._open, self._inputs = {}, {}
            case "finish-step":
                assert self.is_whole
                self._inputs = {}
            case "finish":
                self.finish_reason = chunk["finishReason"]
            case "abort":
                self.aborted = True
            case "error":
                self.error = chunk["errorText"]
            case _:
                self._apply_to_tool(chunk)

    def _apply_to_tool(self, chunk: Chunk) -> None:
        match chunk["type"]:
            case "tool-input-start":
                self._inputs[chunk["toolCallId"]] = ""
                self._tool(chunk)
            case "tool-input-delta":
                self._inputs[chunk["toolCallId"]] += chunk["inputTextDelta"]
            case "tool-input-available" | "tool-input-error":
                self._tool(chunk)["input"] = chunk["input"]
            case "tool-output-available":
                (part,) = [part for part in self.parts if part.get("id") == chunk["toolCallId"]]
                part["output"] = chunk["output"]
            case other:
                raise AssertionError(f"the AI SDK knows no chunk {other}")

    def _tool(self, chunk: Chunk) -> dict[str, Any]:
        """Return the part of a call in this step, which is made if there is none."""
        begin = max(number for number, part in enumerate(self.parts) if part["type"] == "step-start")
        for part in self.parts[begin:]:
            if part.get("id") == chunk["toolCallId"]:
                return part
        made: dict[str, Any] = {"type": "tool", "id": chunk["toolCallId"], "name": chunk["toolName"]}
        self.parts.append(made)
        return made
