"""Turns the items of a Responses request into chat messages, and messages back into items.

In: ``input`` of a request; ``messages`` of a stored job.
Out: ``messages`` of a job; ``input_items``. What a message cannot express is refused by its name.

An assistant's turn comes as several items: reasoning, a message, tool calls. Neighbours become one message. If the
reasoning carries the whole message of one of our answers (see ``carried``), and text and calls beside it are still the
same, the message goes back as it was, with the reasoning and the signatures that the provider wants to see again; if a
client changed them, what it says counts.  Pure.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from keepstream_gateway.openai import carried
from keepstream_gateway.openai.refusals import refused, unsupported, wrong_type

#: Compared with what a client sent, which may be a list, say: that can be looked for in a tuple only.
_ROLES: Final = ("user", "system", "developer", "assistant")
_TEXTS: Final = ("input_text", "output_text", "text")
_CALLS: Final[Mapping[str, str]] = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS: Final = frozenset({"function_call_output", "custom_tool_call_output"})

Message = dict[str, Any]


def messages_of(items: object) -> list[Message]:
    """Return the messages of ``input``: a text, or a list of items.

    Raises:
        ApiError: naming the item that no message can express.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise wrong_type("input", "a string or a list of items")
    reader = _Reader()
    for number, item in enumerate(items):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise wrong_type(where, "an object")
        reader.read(item, where)
    return reader.end()


class _Turn:
    """An assistant's turn while its items are read."""

    def __init__(self) -> None:
        self.original: Message | None = None  # as one of our answers carried it
        self.texts: list[str] = []
        self.refusals: list[str] = []
        self.calls: list[Message] = []
        self.has_message = False

    def message(self) -> Message | None:
        text, refusal = "".join(self.texts), "".join(self.refusals)
        if self.original is not None and self._is_unchanged(self.original, text, refusal):
            return self.original
        if not (self.has_message or self.calls):
            return None  # reasoning alone, which only its provider could read
        message: Message = {"role": "assistant", "content": text or (None if self.calls or refusal else "")}
        if refusal:
            message["refusal"] = refusal
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def _is_unchanged(self, original: Message, text: str, refusal: str) -> bool:
        calls = original.get("tool_calls")
        known = [_plain_call(call) for call in calls] if isinstance(calls, list) else []
        return (
            _text_of(original.get("content")) == text
            and (original.get("refusal") or "") == refusal
            and known == self.calls
        )


class _Reader:
    """Reads items in their order."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._turn: _Turn | None = None
        self._may_carry = carried.MAX_BYTES

    def end(self) -> list[Message]:
        self._end_turn()
        return self._messages

    def read(self, item: Mapping[str, Any], where: str) -> None:
        kind = _text(item.get("type", "message"), f"{where}.type")
        if kind == "reasoning":
            self._reason(item, where)
        elif kind in _CALLS:
            self._open_turn().calls.append(_call_of(item, kind, where))
        elif kind in _RESULTS:
            self._end_turn()
            call_id = _text(item.get("call_id"), f"{where}.call_id")
            output = _content(item.get("output"), f"{where}.output", user=False)
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind == "message":
            self._read_message(item, where)
        elif kind == "item_reference":
            raise unsupported(where, "give the item itself, or 'previous_response_id'")
        else:
            raise unsupported(
                where, "hosted tools and their items are not: give messages, function calls and their outputs"
            )

    def _reason(self, item: Mapping[str, Any], where: str) -> None:
        if self._turn is not None and (self._turn.original or self._turn.has_message or self._turn.calls):
            original = self._carried(item, where)
            if original is None:
                return  # more reasoning within a turn
            if self._turn.original is None:
                self._turn.original = original  # some answers carry it at their end
                return
            self._end_turn()
        turn = self._open_turn()
        turn.original = self._carried(item, where)

    def _carried(self, item: Mapping[str, Any], where: str) -> Message | None:
        """Return the message that an item of reasoning carries, if it carries one."""
        try:
            found = carried.unpack(item.get("encrypted_content"), self._may_carry)
        except carried.TooLargeError:
            what = f"what the items carry is larger than the {carried.MAX_BYTES} bytes that are accepted"
            raise refused(what, f"{where}.encrypted_content") from None
        if found is None:
            return None
        message, size = found
        self._may_carry -= size
        return message

    def _read_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise refused(f"'{where}.role' must be user, assistant, system or developer", f"{where}.role")
        if role == "assistant":
            turn = self._open_turn()
            if turn.has_message and turn.original is None:  # two answers in a row
                self._end_turn()
                turn = self._open_turn()
            turn.has_message = True
            _read_answer(turn, item.get("content"), f"{where}.content")
            return
        self._end_turn()
        content = _content(item.get("content"), f"{where}.content", user=role == "user")
        self._messages.append({"role": role, "content": content})

    def _open_turn(self) -> _Turn:
        if self._turn is None:
            self._turn = _Turn()
        return self._turn

    def _end_turn(self) -> None:
        message = self._turn.message() if self._turn is not None else None
        if message is not None:
            self._messages.append(message)
        self._turn = None


def _read_answer(turn: _Turn, content: object, where: str) -> None:
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        if isinstance(part, str):
            turn.texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXTS:
            turn.texts.append(_text(part.get("text"), f"{where}[{number}].text"))
        elif isinstance(part, dict) and part.get("type") == "refusal":
            turn.refusals.append(_text(part.get("refusal"), f"{where}[{number}].refusal"))
        else:
            raise wrong_type(where, "a string or a list of output_text and refusal parts")


def _call_of(item: Mapping[str, Any], kind: str, where: str) -> Message:
    name = _text(item.get("name"), f"{where}.name")
    call_id = _text(item.get("call_id"), f"{where}.call_id")
    given = _text(item.get(_CALLS[kind]), f"{where}.{_CALLS[kind]}")
    if kind == "custom_tool_call":
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": given}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def _plain_call(call: Any) -> Message:
    fields = call if isinstance(call, dict) else {}
    return {name: value for name, value in fields.items() if name in {"id", "type", "function", "custom"}}


def _content(value: object, where: str, *, user: bool) -> Any:
    """Return the content of a message that is no answer; only a user's has more than texts, and a tool's perhaps."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(where, "a string or a list of parts")
    parts = [_part(part, f"{where}[{number}]") for number, part in enumerate(value)]
    if all(part.keys() == {"type", "text"} for part in parts) and (len(parts) == 1 or not user):
        return "".join(part["text"] for part in parts)  # the form that every server takes
    return parts


def _part(part: object, where: str) -> Message:
    if not isinstance(part, dict):
        raise wrong_type(where, "an object")
    kind = part.get("type")
    kept = {"prompt_cache_breakpoint": known} if (known := part.get("prompt_cache_breakpoint")) is not None else {}
    if kind in _TEXTS:
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text"), **kept}
    if kind == "input_image":
        if part.get("file_id"):
            raise unsupported(f"{where}.file_id", "there are no files here: give 'image_url'")
        image = {"url": _text(part.get("image_url"), f"{where}.image_url")}
        if part.get("detail") is not None:
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image, **kept}
    if kind == "input_file":
        if part.get("file_url"):
            raise unsupported(f"{where}.file_url", "chat completions have no files by URL: give 'file_data'")
        names = ("file_id", "file_data", "filename")
        return {"type": "file", "file": {name: part[name] for name in names if part.get(name) is not None}, **kept}
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "input_audio", "input_audio": part["input_audio"], **kept}
    raise unsupported(f"{where}.type", "parts are input_text, input_image, input_file and input_audio")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(where, "a string")
    return value


def _text_of(content: object) -> str:
    if isinstance(content, list):
        parts = (part for part in content if isinstance(part, dict) and part.get("type") == "text")
        return "".join(str(part.get("text", "")) for part in parts)
    return content if isinstance(content, str) else ""


# -- and back -------------------------------------------------------------------------------------


def items_of(messages: Sequence[Any], job_id: str) -> list[dict[str, Any]]:
    """Return the items of a stored job's messages, each with an id that follows from the job and its place."""
    items = []
    for number, message in enumerate(messages):
        if isinstance(message, dict):
            for place, item in enumerate(_items_of(message)):
                kind = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
                prefix = kind.get(item["type"], "fco")
                items.append({"id": f"{prefix}_{job_id}_in_{number}_{place}", **item, "status": "completed"})
    return items


def _items_of(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    role = message.get("role")
    content = message.get("content")
    if role == "tool":
        output = content if isinstance(content, str) else [_back(part) for part in _parts(content)]
        yield {"type": "function_call_output", "call_id": message.get("tool_call_id"), "output": output or ""}
        return
    if role != "assistant":
        yield {"type": "message", "role": role, "content": [_back(part) for part in _parts(content)]}
        return
    carries = carried.pack(message)
    if carries:
        yield {"type": "reasoning", "summary": [], "encrypted_content": carries}
    answer: list[dict[str, Any]] = []
    if text := _text_of(content):
        answer.append({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    if message.get("refusal"):
        answer.append({"type": "refusal", "refusal": message["refusal"]})
    if answer:
        yield {"type": "message", "role": "assistant", "content": answer}
    for call in _list(message.get("tool_calls")):
        plain = _plain_call(call)
        custom, function = plain.get("custom"), plain.get("function")
        if isinstance(custom, dict):
            fields = {"name": custom.get("name"), "input": custom.get("input")}
            yield {"type": "custom_tool_call", "call_id": plain.get("id"), **fields}
        elif isinstance(function, dict):
            fields = {"name": function.get("name"), "arguments": function.get("arguments")}
            yield {"type": "function_call", "call_id": plain.get("id"), **fields}


def _parts(content: object) -> list[Any]:
    """Return the parts of a stored content; jobs that came as chat completions may have any JSON there."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else _list(content)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _back(part: Any) -> Any:
    """Return a part of a chat message as the Responses API has it."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    rest = {name: value for name, value in part.items() if name not in {"type", str(kind)}}
    if kind == "text":
        return {"type": "input_text", "text": part.get("text"), **{k: v for k, v in rest.items() if k != "text"}}
    if kind == "image_url":
        image = part.get("image_url")
        image = image if isinstance(image, dict) else {"url": image}
        return {"type": "input_image", "image_url": image.get("url"), "detail": image.get("detail", "auto"), **rest}
    if kind == "file" and isinstance(part.get("file"), dict):
        return {"type": "input_file", **part["file"], **rest}
    return part
