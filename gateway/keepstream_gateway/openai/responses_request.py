"""Turns a request to the Responses API into a job.

In: the body of ``POST /v1/responses``; for ``previous_response_id``, the earlier job.
Out: the fields of a job; or an ``ApiError``, naming the parameter that a job cannot express.

Nothing that changes the answer is dropped in silence: a parameter is translated, passed on under the same name, or
refused. Only values that change nothing are left out (``truncation: disabled``, ``reasoning.summary: auto``).  Pure.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from keepstream import names
from keepstream.results import CompletionResult
from keepstream_gateway.openai.ids import response_id
from keepstream_gateway.openai.origin import ENTRY, Origin, checked_metadata, read_origin
from keepstream_gateway.openai.refusals import refused, unknown, unsupported, wrong_type
from keepstream_gateway.openai.responses_input import messages_of

#: The one parameter that is ours: fields of the job's envelope, as provider, fallbacks, class, max_attempts.
ENVELOPE: Final = "keepstream"

_SAME: Final = (
    "frequency_penalty",
    "parallel_tool_calls",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "temperature",
    "top_logprobs",
    "top_p",
    "user",
)
_NOT_HERE: Final[Mapping[str, str]] = {
    "access_programs": "leave it out",
    "context_management": "leave it out, and shorten the input yourself",
    "conversation": "give 'previous_response_id', or the whole conversation as 'input'",
    "generate": "leave it out",
    "image": "leave it out",
    "max_tool_calls": "it limits hosted tools, of which there are none here",
    "moderation": "leave it out",
    "prompt": "there are no stored prompts here: give 'instructions' and 'input'",
}
_LOGPROBS: Final = "message.output_text.logprobs"
#: What else may be asked to be included: it always is, or belongs to hosted tools, of which there are none.
_INCLUDED: Final = frozenset(
    {
        "reasoning.encrypted_content",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
    }
)


def job_fields(body: Mapping[str, Any], previous: CompletionResult | None = None) -> dict[str, Any]:
    """Return the fields of the job that ``body`` asks for, as ``keepstream.jobs.make_job`` takes them.

    Args:
        body: The decoded body.
        previous: The job that ``previous_response_id`` names.

    Raises:
        ApiError: something in it cannot be expressed.
    """
    for name in body:
        if name not in _KNOWN:
            raise unknown(name, _KNOWN)
    for name, remedy in _NOT_HERE.items():
        if body.get(name) is not None:
            raise unsupported(name, remedy)
    request: dict[str, Any] = {"model": _model(body.get("model"))}
    instructions = body.get("instructions")
    messages = _instructions(instructions)
    if previous is not None:
        messages += _conversation(previous)
    messages += messages_of(body["input"]) if body.get("input") is not None else []
    if not messages[instructions is not None :]:
        raise refused("'input' is missing", "input", "missing_required_parameter")
    request["messages"] = messages
    request |= {name: body[name] for name in _SAME if body.get(name) is not None}
    for name, translate in _TRANSLATED.items():
        if body.get(name) is not None:
            translate(request, body[name])
    background = flag(body, "background")
    if background and body.get("store") is False:
        raise refused("a background response is stored; leave 'store' out, or set it to true", "store")
    metadata = checked_metadata(body.get("metadata"))
    reasoning = body.get("reasoning")
    origin = Origin(
        background=background,
        previous_response_id=response_id(previous.id) if previous else None,
        instructions=1 if instructions is not None else 0,
        summary=reasoning.get("summary") if isinstance(reasoning, dict) else None,
    )
    fields = envelope(body, with_request=True)
    return fields | {
        "request": fields.get("request", {}) | request,
        "metadata": metadata | {ENTRY: origin.model_dump(exclude_defaults=True)},
    }


def envelope(body: Mapping[str, Any], *, with_request: bool = False) -> dict[str, Any]:
    """Return the fields of the envelope that a request gives under our own name.

    Args:
        body: The request's.
        with_request: Whether ``request`` may be one of them: parameters of chat completions that the Responses API
            has no name for.

    Raises:
        ApiError: they are not an object, or name what is not a client's to choose.
    """
    given = body.get(ENVELOPE)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise wrong_type(ENVELOPE, "an object")
    for name in ("v", "id", "tenant", "metadata", "idempotency_key", *(() if with_request else ("request",))):
        if name in given:
            raise refused(f"'{ENVELOPE}.{name}' cannot be set here", f"{ENVELOPE}.{name}", "unsupported_parameter")
    if not isinstance(given.get("request", {}), dict):
        raise wrong_type(f"{ENVELOPE}.request", "an object")
    return dict(given)


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return a parameter that is true or false; absent or null is false.

    Raises:
        ApiError: it is something else.
    """
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false")
    return value


def _model(value: object) -> Any:
    if value is None:
        raise refused("'model' is missing", "model", "missing_required_parameter")
    return value


def _instructions(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, str):
        raise wrong_type("instructions", "a string")
    return [{"role": "system", "content": value}]


def _conversation(previous: CompletionResult) -> list[dict[str, Any]]:
    """Return the messages of an earlier job, with its answer, without its instructions."""
    name = "previous_response_id"
    if not previous.status.terminal:
        raise refused("the previous response has not ended yet; wait for it", name, "response_not_ended")
    if not previous.choices or previous.request is None:
        raise refused("the previous response has no output to go on from", name, "response_without_output")
    messages = previous.request["messages"][read_origin(previous.metadata).instructions :]
    return [*messages, previous.assistant_message()]


# -- parameters -----------------------------------------------------------------------------------


def _max_output_tokens(request: dict[str, Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("max_output_tokens", "a whole number")
    request["max_completion_tokens"] = value


def _text(request: dict[str, Any], value: Any) -> None:
    if not isinstance(value, dict):
        raise wrong_type("text", "an object")
    for name in value:
        if name not in {"format", "verbosity"}:
            raise unknown(f"text.{name}", ("text.format", "text.verbosity"))
    if value.get("verbosity") is not None:
        request["verbosity"] = value["verbosity"]
    form = value.get("format")
    if form is None:
        return
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        known = ("name", "description", "schema", "strict")
        schema = {name: form[name] for name in known if form.get(name) is not None}
        request["response_format"] = {"type": kind, "json_schema": schema}
    elif kind == "json_object":
        request["response_format"] = {"type": kind}
    elif kind != "text":
        raise unsupported("text.format", "its type is text, json_object or json_schema")


def _reasoning(request: dict[str, Any], value: Any) -> None:
    if not isinstance(value, dict):
        raise wrong_type("reasoning", "an object")
    for name, given in value.items():
        if given is None:
            continue
        if name == "effort":
            request["reasoning_effort"] = given
        elif not (name in {"summary", "generate_summary"} and given == "auto"):
            raise unsupported(f"reasoning.{names.shown(name)}", "reasoning is told as the provider gives it")


def _tools(request: dict[str, Any], value: Any) -> None:
    if not isinstance(value, list):
        raise wrong_type("tools", "a list")
    if value:
        request["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(value)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "function":
        known = ("name", "description", "parameters", "strict")
        for name, value in tool.items():
            if name not in {"type", *known} and value not in (None, False):
                raise unsupported(f"{where}.{names.shown(name)}")
        return {"type": kind, "function": {name: tool[name] for name in known if tool.get(name) is not None}}
    if kind == "custom":
        custom = {name: tool[name] for name in ("name", "description", "format") if tool.get(name) is not None}
        form = custom.get("format")
        if isinstance(form, dict) and form.get("type") == "grammar":
            grammar = {name: value for name, value in form.items() if name != "type"}
            custom["format"] = {"type": "grammar", "grammar": grammar}
        return {"type": kind, "custom": custom}
    raise unsupported(f"{where}.type", "tools are functions and custom tools; hosted ones are not run here")


def _tool_choice(request: dict[str, Any], value: Any) -> None:
    if isinstance(value, str):
        request["tool_choice"] = value
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("function", "custom"):
        request["tool_choice"] = _named(value)
    elif kind == "allowed_tools" and isinstance(value.get("tools"), list):
        tools = [_named(tool) if isinstance(tool, dict) else tool for tool in value["tools"]]
        request["tool_choice"] = {"type": kind, kind: {"mode": value.get("mode", "auto"), "tools": tools}}
    else:
        raise unsupported(
            "tool_choice", "it is none, auto, required, a function, a custom tool, or allowed_tools of these"
        )


def _named(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reference to a tool with its name below the type."""
    kind = str(choice.get("type"))
    return {"type": kind, kind: {"name": choice.get("name")}}


def _include(request: dict[str, Any], value: Any) -> None:
    if not isinstance(value, list):
        raise wrong_type("include", "a list")
    for entry in value:
        if entry == _LOGPROBS:
            request["logprobs"] = True
        elif not isinstance(entry, str) or entry not in _INCLUDED:
            raise unsupported("include", "it may name encrypted reasoning and logprobs")


def _truncation(request: dict[str, Any], value: Any) -> None:
    if value != "disabled":
        raise unsupported("truncation", "an input that is too long is refused by the provider: shorten it yourself")


def _background_options(request: dict[str, Any], value: Any) -> None:
    window = value.get("completion_window") if isinstance(value, dict) else value
    if not isinstance(value, dict) or window not in (None, "soonest"):
        raise unsupported("background_options.completion_window", 'give "keepstream": {"class": "bulk"} instead')


_TRANSLATED: Final[Mapping[str, Callable[[dict[str, Any], Any], None]]] = {
    "background_options": _background_options,
    "include": _include,
    "max_output_tokens": _max_output_tokens,
    "reasoning": _reasoning,
    "text": _text,
    "tool_choice": _tool_choice,
    "tools": _tools,
    "truncation": _truncation,
}
_KNOWN: Final = frozenset(
    {
        *_SAME,
        *_TRANSLATED,
        *_NOT_HERE,
        ENVELOPE,
        "background",
        "input",
        "instructions",
        "metadata",
        "model",
        "previous_response_id",
        "store",
        "stream",
        "stream_options",
    }
)
