"""The list of jobs as people see it.

In: what was asked for, and a page of jobs.  Out: a ``JobsView`` to the page.  Pure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from urllib.parse import quote, urlencode

from keepstream import names
from keepstream.client.listing import Place, Wanted
from keepstream.errors import ErrorCode
from keepstream.results import TERMINAL_STATUSES, JobPage, JobStatus, JobSummary
from keepstream_gateway.console.words import Moment, Tone, duration, moment, status, tokens

_ID: Final = re.compile(names.ID_PATTERN)


@dataclass(frozen=True, slots=True)
class Choice:
    """Something to choose."""

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, as it was typed."""

    q: str = ""
    status: str = ""
    tenant: str = ""
    provider: str = ""
    model: str = ""
    error: str = ""
    since: str = ""
    before: str = ""  #: TENANT/ID of the job after which the page begins.

    @property
    def place(self) -> Place | None:
        """From where the page goes on; None: from the newest job, or there can be no such place."""
        tenant, _, job_id = self.before.partition("/")
        return Place(tenant, job_id) if all(map(_ID.fullmatch, (tenant, job_id))) else None

    def address(self, before: Place | None = None) -> str:
        """Return the address of the same with another beginning."""
        page = replace(self, before="" if before is None else f"{before.tenant}/{before.job_id}")
        given = {name: value for name, value in asdict(page).items() if value}
        return f"/jobs?{urlencode(given)}" if given else "/jobs"


_OPEN: Final = "open"
GROUPS: Final = (
    Choice(_OPEN, "Not ended"),
    *(Choice(each.value, each.value.capitalize()) for each in JobStatus),
)
_SINCES: Final[Mapping[str, tuple[str, timedelta | None]]] = {
    "": ("Any time", None),
    "1h": ("In the last hour", timedelta(hours=1)),
    "24h": ("In the last 24 hours", timedelta(hours=24)),
    "7d": ("In the last 7 days", timedelta(days=7)),
}
SINCES: Final = tuple(Choice(name, words) for name, (words, _) in _SINCES.items())

ERROR_CODES: Final = tuple(sorted(code.value for code in ErrorCode))


def asked(query: Mapping[str, str]) -> Asked:
    """Return what the address asks for."""
    return Asked(**{name: query.get(name, "").strip() for name in Asked.__dataclass_fields__})


def wanted(ask: Asked, now: datetime) -> Wanted:
    """Return what the jobs are to be like; what nobody can ask for is left out."""
    _, back = _SINCES.get(ask.since, _SINCES[""])
    statuses = tuple(each for each in JobStatus if each.value == ask.status)
    if ask.status == _OPEN:
        statuses = tuple(each for each in JobStatus if each not in TERMINAL_STATUSES)
    return Wanted(
        statuses=statuses,
        model=ask.model or None,
        provider=ask.provider or None,
        error_code=ask.error or None,
        since=None if back is None else now - back,
        containing=ask.q or None,
    )


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job."""

    address: str
    anchor: str
    title: str
    id: str
    tenant: str  #: Empty: it is the one that was asked for.
    target: str
    status: Tone
    created: Moment
    note: str  #: What it waits for, or why it failed.
    is_bad: bool
    cost: str


@dataclass(frozen=True, slots=True)
class JobsView:
    """The page."""

    asked: Asked
    address: str
    is_first: bool
    is_filtered: bool
    newest: str
    older: str | None
    looked_back_to: str | None
    jobs: Sequence[JobRow]
    tenants: Sequence[str]
    problem: str
    status_groups: Sequence[Choice] = GROUPS
    error_codes: Sequence[str] = ERROR_CODES
    sinces: Sequence[Choice] = SINCES


def address_of(tenant: str, job_id: str) -> str:
    """Return the address of a job's page."""
    return f"/jobs/{quote(tenant)}/{quote(job_id)}"


def show(
    ask: Asked, page: JobPage, older: Place | None, tenants: Sequence[str], now: datetime, problem: str = ""
) -> JobsView:
    """Return the page."""
    return JobsView(
        asked=ask,
        address=ask.address(ask.place),
        is_first=not ask.before,
        is_filtered=ask.address() != "/jobs",
        newest=ask.address(),
        older=None if older is None else ask.address(older),
        looked_back_to=None if page.looked_back_to is None else moment(page.looked_back_to, now).full,
        jobs=[_row(job, ask, now) for job in page],
        tenants=tenants,
        problem=problem,
    )


def _row(job: JobSummary, ask: Asked, now: datetime) -> JobRow:
    used = tokens(job.usage)
    lasted = ""
    if job.started_at is not None:
        lasted = duration(((job.finished_at or now) - job.started_at).total_seconds())
    note, is_bad = "", False
    if job.waiting_for is not None:
        note, is_bad = f"waits for {job.waiting_for.text}", not job.waiting_for.passes
    elif job.error is not None and job.status is not JobStatus.CANCELLED:
        note, is_bad = f"{job.error.code}: {job.error.message}", True
    return JobRow(
        address=address_of(job.tenant, job.id),
        anchor=f"job-{job.tenant}-{job.id}",
        title=job.prompt_start or job.id,
        id=job.id,
        tenant="" if ask.tenant else job.tenant,
        target=f"{job.provider}/{job.model}",
        status=status(job.status),
        created=moment(job.created_at, now),
        note=note,
        is_bad=is_bad,
        cost=" · ".join(filter(None, (used, lasted))),
    )
