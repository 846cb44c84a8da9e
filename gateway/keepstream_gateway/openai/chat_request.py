"""Turns a request for a chat completion into a job.

In: the body of ``POST /v1/chat/completions``.  Out: the fields of a job.

A job's request is a chat-completions body already, so all of it goes to the provider as it is, but for what is ours to
do: streaming, storing, the client's metadata, and the job's envelope under our own name.  Pure.
"""

from collections.abc import Mapping
from typing import Any, Final

from keepstream_gateway.openai.origin import checked_metadata
from keepstream_gateway.openai.refusals import unknown, wrong_type
from keepstream_gateway.openai.responses_request import ENVELOPE, envelope, flag

_OURS: Final = frozenset({"stream", "stream_options", "store", "metadata", ENVELOPE})
_STREAM_OPTIONS: Final = ("include_usage", "include_obfuscation")


def job_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the job that ``body`` asks for, as ``keepstream.jobs.make_job`` takes them.

    Raises:
        ApiError: one of the parameters that are ours has a wrong value.
    """
    wants_usage(body)
    flag(body, "store")  # everything is stored here; a client that says otherwise is told so by the documentation
    return envelope(body) | {
        "request": {name: value for name, value in body.items() if name not in _OURS},
        "metadata": checked_metadata(body.get("metadata")),
    }


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Return whether a stream is to end with its usage.

    Raises:
        ApiError: the stream options are not as they must be.
    """
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object")
    for name in options:
        if name not in _STREAM_OPTIONS:
            raise unknown(f"stream_options.{name}", [f"stream_options.{known}" for known in _STREAM_OPTIONS])
    return flag(options, "include_usage")
