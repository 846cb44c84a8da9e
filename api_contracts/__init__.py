"""The contract between Millrace and the services that use it.

In: nothing.  Out: the job, the events, the results, the error codes and every public name.  The base
needs pydantic only; ``api_contracts.client`` (extra ``client``) brings Celery, Redis and SQLAlchemy.
"""

from api_contracts.errors import ErrorCode, ErrorInfo, MillraceError
from api_contracts.events import Event, is_terminal, parse_event
from api_contracts.jobs import Job, parse_job
from api_contracts.results import (
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
from api_contracts.transcript import Transcript

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
    "MillraceError",
    "ToolCall",
    "Transcript",
    "Usage",
    "UsageSource",
    "is_terminal",
    "output_sha256",
    "parse_event",
    "parse_job",
]
