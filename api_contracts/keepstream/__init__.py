"""The contract between Keepstream and the services that use it.

In: nothing.  Out: the job, the events, the results, the error codes and every public name.  The base
needs pydantic only; ``keepstream.client.client`` (extra ``client``) brings Celery, Redis and SQLAlchemy.
"""

from keepstream.errors import ErrorCode, ErrorInfo, KeepstreamError
from keepstream.events import Event, is_terminal, parse_event
from keepstream.jobs import Job, parse_job
from keepstream.results import (
    AttemptResult,
    Choice,
    CompletionResult,
    JobStatus,
    JobSummary,
    ToolCall,
    Usage,
    UsageSource,
    output_sha256,
)
from keepstream.transcript import Transcript

__all__ = [
    "AttemptResult",
    "Choice",
    "CompletionResult",
    "ErrorCode",
    "ErrorInfo",
    "Event",
    "Job",
    "JobStatus",
    "JobSummary",
    "KeepstreamError",
    "ToolCall",
    "Transcript",
    "Usage",
    "UsageSource",
    "is_terminal",
    "output_sha256",
    "parse_event",
    "parse_job",
]
