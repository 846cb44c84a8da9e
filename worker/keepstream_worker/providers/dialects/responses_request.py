"""Writes a chat-completions request as a request to the Responses API.

In: the request of a job, from the provider module.
Out: the body for ``POST …/responses``; or ``NotExpressibleError``, naming the parameter that has no equivalent there.

Nothing that changes the answer is dropped in silence: a parameter is translated, passed on as it is, or refused. Only
values that change nothing (``n: 1``, a penalty of 0) are left out. What chat completions do not know goes out
unchanged, so that ``truncation``, ``reasoning``, ``include`` and the like can be used.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from keepstream.next_turn import ITEMS_FIELD

_MAX_CALL_ID: Final = 64
_HASHED_ID: Final = 32  #: Hexadecimal digits of a call id that replaces a longer one.
_ENCRYPTED_REASONING: Final = "reasoning.encrypted_content"
_LOGPROBS: Final = "message.output_text.logprobs"

#: Fields of stored items that only an answer has.
_ANSWER_FIELDS: Final = frozenset({"status", "created_by", "parsed", "parsed_arguments"})
_CALLS: Final = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}

_USE_CHAT: Final = 'set `api = "chat"` for this model'


class NotExpressibleError(ValueError):
    """The request uses something that the Responses API has no equivalent for; the message says what to do."""

    def __init__(self, parameter: str, remedy: str = _USE_CHAT) -> None:
        super().__init__(f"the Responses API has no {parameter!r}; {remedy}, or leave it out")
        self.parameter = parameter


@dataclass(frozen=True, slots=True)
class ResponsesOptions:
    """How one provider wants to be asked; what OpenAI wants is the default."""

    pass_through: frozenset[str] = frozenset()  #: Parameters to send although OpenAI has none of this name.
    instructions: bool = False  #: Whether leading system texts go into ``instructions`` instead of ``input``.
    reasoning_summary: str | None = None  #: What to ask for; organisations that are not verified may not ask.
    encrypted_reasoning: bool = False  #: Whether to ask for reasoning that the next turn can give back.
    return_items: bool = True  #: Whether an earlier answer goes back as the provider gave it, or as a plain message.
    item_ids: bool = True  #: Whether reasoning that goes back keeps its id; some providers know none.


def encode(request: Mapping[str, Any], provider: str, options: ResponsesOptions | None = None) -> dict[str, Any]:
    """Return the body for ``POST …/responses`` that asks what ``request``, a chat-completions body, asks.

    Args:
        request: The chat-completions body.
        provider: The provider's name; the items of an earlier answer go back only to the one that gave it.
        options: How the provider wants to be asked.

    Raises:
        NotExpressibleError: a parameter or a message has no equivalent.
    """
    options = options or ResponsesOptions()
    body: dict[str, Any] = {}
    rest = dict(request)
    messages = rest.pop("messages", None)
    for name, translate in _PARAMETERS.items():
        if name in rest and name not in options.pass_through:
            translate(body, name, rest.pop(name))
    # What chat completions do not know wins over what was translated, field by field.
    for name, value in rest.items():
        if name in {"background", "conversation"} and value:
            raise NotExpressibleError(name, "it gives the answer another life than a stream's")
        known = body.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            body[name] = {**known, **value}
        elif isinstance(known, list) and isinstance(value, list):
            body[name] = known + [item for item in value if item not in known]
        else:
            body[name] = value
    if body.get("store") is None:
        body["store"] = False  # here the default is to keep an answer for a month
    if body.get("previous_response_id") and not body["store"]:
        raise NotExpressibleError("previous_response_id without store", 'give "store": true with it')
    if options.reasoning_summary is not None:
        body["reasoning"] = {"summary": options.reasoning_summary, **(body.get("reasoning") or {})}
    if options.encrypted_reasoning and not body["store"]:
        _include(body, _ENCRYPTED_REASONING)
    if messages is not None:
        giver = provider if options.return_items else None
        items = _Items(giver, stored=bool(body["store"]), keep_ids=options.item_ids)
        body["input"] = items.of(messages) if isinstance(messages, list) else messages
        if options.instructions:
            _move_instructions(body)
    body["stream"] = True
    return body


# -- parameters -----------------------------------------------------------------------------------


def _include(body: dict[str, Any], what: str) -> None:
    included = body.get("include")
    if isinstance(included, list):
        if what not in included:
            body["include"] = [*included, what]
    elif included is None:
        body["include"] = [what]


def _under(*path: str) -> Callable[[dict[str, Any], str, Any], None]:
    """Return a translation that puts a value somewhere else, unless it is null or stands there already."""

    def translate(body: dict[str, Any], _name: str, value: Any) -> None:
        if value is None:
            return
        target = body
        for step in path[:-1]:
            target = target.setdefault(step, {})
        target.setdefault(path[-1], value)

    return translate


def _drop(_body: dict[str, Any], _name: str, _value: Any) -> None:
    """Leave out what is ours to set."""


def _refuse_unless(*neutral: Any, remedy: str = _USE_CHAT) -> Callable[[dict[str, Any], str, Any], None]:
    """Return a translation that leaves out values that change nothing, and refuses all others."""

    def translate(_body: dict[str, Any], name: str, value: Any) -> None:
        if value is not None and value not in neutral:
            raise NotExpressibleError(name, remedy)

    return translate


def _logprobs(body: dict[str, Any], _name: str, value: Any) -> None:
    if value:
        _include(body, _LOGPROBS)


def _response_format(body: dict[str, Any], name: str, value: Any) -> None:
    if not isinstance(value, dict):
        if value is not None:
            body[name] = value  # not a response format; the provider says so in its own words
        return
    kind = value.get("type")
    if kind == "text":
        return
    form = {field: part for field, part in value.items() if field != "json_schema"}
    schema = value.get("json_schema")
    if isinstance(schema, dict):
        form |= schema  # one level up from where chat completions have it
    body.setdefault("text", {})["format"] = form


def _tools(body: dict[str, Any], _name: str, value: Any) -> None:
    if value is not None:
        body["tools"] = [_tool(tool) for tool in value] if isinstance(value, list) else value


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    function, custom = tool.get("function"), tool.get("custom")
    if tool.get("type") == "function" and isinstance(function, dict):
        flat = {"type": "function", **function}
        flat.setdefault("parameters", {"type": "object", "properties": {}})
        # Here an absent `strict` means yes if possible, and optional arguments would come back filled in.
        if flat.get("strict") is None:
            flat["strict"] = False
        return flat
    if tool.get("type") == "custom" and isinstance(custom, dict):
        flat = {"type": "custom", **custom}
        form = flat.get("format")
        if isinstance(form, dict) and isinstance(form.get("grammar"), dict):
            flat["format"] = {"type": "grammar", **form["grammar"]}
        return flat
    return tool


def _tool_choice(body: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        return
    body[name] = _flat_choice(value)
    if isinstance(value, dict) and isinstance(allowed := value.get("allowed_tools"), dict):
        tools = allowed.get("tools")
        body[name] = {
            "type": "allowed_tools",
            **allowed,
            **({"tools": [_flat_choice(tool) for tool in tools]} if isinstance(tools, list) else {}),
        }


def _flat_choice(value: Any) -> Any:
    """Return a reference to a tool with its name beside the type instead of below it."""
    if not isinstance(value, dict):
        return value
    for kind in ("function", "custom"):
        inner = value.get(kind)
        if value.get("type") == kind and isinstance(inner, dict):
            return {"type": kind, "name": inner.get("name")}
    return value


_PARAMETERS: Final[Mapping[str, Callable[[dict[str, Any], str, Any], None]]] = {
    "max_completion_tokens": _under("max_output_tokens"),
    "max_tokens": _under("max_output_tokens"),
    "n": _refuse_unless(1),
    "stop": _refuse_unless([]),
    "seed": _refuse_unless(),
    "logit_bias": _refuse_unless({}),
    "frequency_penalty": _refuse_unless(0),
    "presence_penalty": _refuse_unless(0),
    "logprobs": _logprobs,
    "response_format": _response_format,
    "verbosity": _under("text", "verbosity"),
    "reasoning_effort": _under("reasoning", "effort"),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "functions": _refuse_unless([], remedy="give 'tools' instead"),
    "function_call": _refuse_unless(remedy="give 'tool_choice' instead"),
    "modalities": _refuse_unless(["text"]),
    "audio": _refuse_unless(),
    "prediction": _refuse_unless(),
    "web_search_options": _refuse_unless(remedy='give the tool {"type": "web_search"} instead'),
    "stream": _drop,
    "stream_options": _drop,
}


# -- messages -------------------------------------------------------------------------------------


class _Items:
    """Turns messages into items; knows which calls are custom ones, since their results have another type."""

    def __init__(self, provider: str | None, *, stored: bool, keep_ids: bool) -> None:
        self._provider = provider
        self._stored = stored
        self._keep_ids = keep_ids
        self._custom: set[str] = set()

    def of(self, messages: list[Any]) -> list[Any]:
        """Return the items of a conversation, in its order."""
        items: list[Any] = []
        for number, message in enumerate(messages):
            if isinstance(message, dict):
                items += self._of_message(message, number)
            else:
                items.append(message)  # not a message; the provider says so in its own words
        return items

    def _of_message(self, message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        role = message.get("role")
        if role == "assistant":
            return self._of_answer(message, number)
        if role == "tool":
            call_id = _call_id(message.get("tool_call_id"))
            kind = _CALLS["custom_tool_call" if call_id in self._custom else "function_call"]
            output = message.get("content")
            return [{"type": kind, "call_id": call_id, "output": "" if output is None else _parts(output, number)}]
        if role == "function":
            raise NotExpressibleError(f"messages[{number}]: role function", "give the result as role 'tool'")
        return [{"type": "message", "role": role, "content": _parts(message.get("content"), number)}]

    def _of_answer(self, message: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        original = message.get(ITEMS_FIELD)
        if isinstance(original, dict) and self._provider is not None and original.get("provider") == self._provider:
            returned = original.get("items")
            if isinstance(returned, list):
                return self._returned(returned)
        if message.get("audio"):
            raise NotExpressibleError(f"messages[{number}].audio")
        if message.get("function_call"):
            raise NotExpressibleError(f"messages[{number}].function_call", "give it among 'tool_calls'")
        items: list[dict[str, Any]] = []
        text = _text_of(message.get("content")) or _text_of(message.get("refusal"))
        if text:
            items.append({"type": "message", "role": "assistant", "content": text})
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            items += [self._of_call(call) for call in calls if isinstance(call, dict)]
        return items

    def _of_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        call_id = _call_id(call.get("id"))
        custom, function = call.get("custom"), call.get("function")
        if isinstance(custom, dict):
            self._custom.add(call_id)
            return {
                "type": "custom_tool_call",
                "call_id": call_id,
                "name": custom.get("name"),
                "input": custom.get("input", ""),
            }
        function = function if isinstance(function, dict) else {}
        return {
            "type": "function_call",
            "call_id": call_id,
            "name": function.get("name"),
            "arguments": function.get("arguments", ""),
        }

    def _returned(self, items: list[Any]) -> list[dict[str, Any]]:
        """Return the items of an earlier answer as this provider wants them back."""
        returned = []
        for item in items:
            if not isinstance(item, dict):
                continue
            kind = item.get("type")
            kept = {name: value for name, value in item.items() if name not in _ANSWER_FIELDS and value is not None}
            if not self._stored:
                if kind == "reasoning":
                    if not item.get("encrypted_content"):
                        continue  # the provider does not know it, and cannot read it
                    if not self._keep_ids:
                        kept.pop("id", None)
                else:
                    kept.pop("id", None)
            if kind in _CALLS:
                kept["call_id"] = _call_id(item.get("call_id"))
                if kind == "custom_tool_call":
                    self._custom.add(kept["call_id"])
            returned.append(kept)
        return returned


def _call_id(value: Any) -> str:
    """Return a call's id, shortened if it is longer than OpenAI takes: the same for the call and for its result."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= _MAX_CALL_ID:
        return text
    return "call_" + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_HASHED_ID]


def _text_of(content: Any) -> str:
    """Return an assistant's content as one text, the form that every server takes."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        return "".join(text for part in parts if isinstance(text := part.get("text") or part.get("refusal") or "", str))
    return ""


def _parts(content: Any, number: int) -> Any:
    """Return a user's, a system's or a tool's content with the Responses API's types of parts."""
    if not isinstance(content, list):
        return content
    return [_part(part, number) if isinstance(part, dict) else part for part in content]


def _part(part: dict[str, Any], number: int) -> dict[str, Any]:
    kind = part.get("type")
    rest = {name: value for name, value in part.items() if name not in {"type", kind}}
    if kind == "text":
        return {"type": "input_text", "text": part.get("text"), **{k: v for k, v in rest.items() if k != "text"}}
    if kind == "image_url":
        image = part.get("image_url")
        image = image if isinstance(image, dict) else {"url": image}
        return {"type": "input_image", "image_url": image.get("url"), "detail": image.get("detail") or "auto", **rest}
    if kind == "file" and isinstance(file := part.get("file"), dict):
        return {"type": "input_file", **file, **rest}
    if kind == "input_audio":
        raise NotExpressibleError(f"messages[{number}]: input_audio")
    return part  # a part of the Responses API, or one that the provider refuses in its own words


def _move_instructions(body: dict[str, Any]) -> None:
    """Move the system texts at the beginning of the input into ``instructions``."""
    items = body["input"]
    if not isinstance(items, list):
        return
    texts = []
    while items and isinstance(items[0], dict) and items[0].get("role") in {"system", "developer"}:
        content = items[0].get("content")
        if not isinstance(content, str):
            break
        texts.append(content)
        items = items[1:]
    if texts:
        body["instructions"] = "\n\n".join([*texts, *([given] if (given := body.get("instructions")) else [])])
        body["input"] = items
