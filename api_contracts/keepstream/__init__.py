"""What services import to use Keepstream: the contract, and the client.

In: nothing.  Out: the job, the events, the results, the errors, and ``Client`` and ``AsyncClient``.

Everything is loaded when it is first used, so that ``import keepstream`` costs next to nothing.  The contract
needs pydantic only; the two clients need the extra ``client``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from keepstream.client.aio import AsyncClient
    from keepstream.client.sync import Client
    from keepstream.errors import ErrorCode, ErrorInfo, KeepstreamError
    from keepstream.events import Event, RawEvent, is_terminal, parse_event
    from keepstream.jobs import Job, parse_job
    from keepstream.results import (
        AttemptResult,
        Choice,
        CompletionResult,
        JobPage,
        JobStatus,
        JobSummary,
        ToolCall,
        Usage,
        UsageSource,
        WaitingFor,
        output_sha256,
    )
    from keepstream.transcript import Transcript

__all__ = [
    "AsyncClient",
    "AttemptResult",
    "Choice",
    "Client",
    "CompletionResult",
    "ErrorCode",
    "ErrorInfo",
    "Event",
    "Job",
    "JobPage",
    "JobStatus",
    "JobSummary",
    "KeepstreamError",
    "RawEvent",
    "ToolCall",
    "Transcript",
    "Usage",
    "UsageSource",
    "WaitingFor",
    "is_terminal",
    "output_sha256",
    "parse_event",
    "parse_job",
]

#: The module of each public name.
_MODULES: Final = {
    "AsyncClient": "keepstream.client.aio",
    "AttemptResult": "keepstream.results",
    "Choice": "keepstream.results",
    "Client": "keepstream.client.sync",
    "CompletionResult": "keepstream.results",
    "ErrorCode": "keepstream.errors",
    "ErrorInfo": "keepstream.errors",
    "Event": "keepstream.events",
    "Job": "keepstream.jobs",
    "JobPage": "keepstream.results",
    "JobStatus": "keepstream.results",
    "JobSummary": "keepstream.results",
    "KeepstreamError": "keepstream.errors",
    "RawEvent": "keepstream.events",
    "ToolCall": "keepstream.results",
    "Transcript": "keepstream.transcript",
    "Usage": "keepstream.results",
    "UsageSource": "keepstream.results",
    "WaitingFor": "keepstream.results",
    "is_terminal": "keepstream.events",
    "output_sha256": "keepstream.results",
    "parse_event": "keepstream.events",
    "parse_job": "keepstream.jobs",
}
#: What the extra ``client`` installs.
_CLIENT_PACKAGES: Final = frozenset({"redis", "sqlalchemy"})


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used.

    Raises:
        ImportError: the name needs the extra ``client``, and that is not installed.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'keepstream' has no attribute '{name}'", name=name)
    try:
        module = import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name not in _CLIENT_PACKAGES:
            raise
        from keepstream.names import install_hint

        raise ImportError(
            f"keepstream.{name} needs '{error.name}', which is not installed; {install_hint('client')}",
            name=error.name,
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
