"""The console's thinking: sessions, what pages show, and that they show it as text."""

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keepstream.client.listing import Place
from keepstream.client.overview import (
    Activity,
    Errors,
    History,
    Limit,
    Limits,
    RejectedMessage,
    Sums,
    Used,
    Waiting,
)
from keepstream.client.waiting import Worker
from keepstream.errors import ErrorInfo
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
)
from keepstream_gateway.console import job_view, jobs_view, overview_view, rejected_view, session, words
from keepstream_gateway.console.pages import HEADERS, Pages
from keepstream_gateway.console.session import Session

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
MINUTE = int(NOW.timestamp() // 60)
HERE = Session("0123456789ab", "Ada's laptop", "f" * 64)
ATTACK = "<script>alert(1)</script>"
ASSETS = Path(session.__file__).parent / "assets"


# -- sessions --


def test_a_session_needs_the_hash_of_its_key_the_secret_and_its_time() -> None:
    cookie = session.sign("0123456789ab", "hash", b"secret", 1000.0)
    claims = session.read(cookie)
    assert claims is not None
    assert claims.key_id == "0123456789ab"
    assert session.is_signed(claims, "hash", b"secret", 1000.0)
    assert session.is_signed(claims, "hash", b"secret", 999.0 + session.SECONDS)
    assert not session.is_signed(claims, "hash", b"secret", 1000.0 + session.SECONDS)
    assert not session.is_signed(claims, "other hash", b"secret", 1000.0)
    assert not session.is_signed(claims, "hash", b"other secret", 1000.0)


def test_what_is_no_session_is_none() -> None:
    good = session.sign("0123456789ab", "hash", b"secret", 1000.0)
    for cookie in ("", "x", good[:20], good[:-4], "ä" * 40, good * 9):
        claims = session.read(cookie)
        assert claims is None or not session.is_signed(claims, "hash", b"secret", 1000.0), cookie


def test_each_session_has_its_own_form_token() -> None:
    first, second = (session.read(session.sign("0123456789ab", "hash", b"", 1000.0)) for _ in range(2))
    assert first is not None
    assert second is not None
    mine = Session("0123456789ab", "me", session.form_token(first))
    assert session.is_form_token(session.form_token(first), mine)
    assert not session.is_form_token(session.form_token(second), mine)
    assert not session.is_form_token("", mine)
    assert not session.is_form_token("ä", mine)


# -- words --


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.004, "4 ms"), (3.21, "3.2 s"), (59, "59 s"), (125, "2 min 5 s"), (7260, "2 h 1 min"), (200_000, "2 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.25, "0.2"), (42, "42"), (12_345, "12 k"), (2_345_678, "2.3 M")]
)
def test_numbers_at_a_glance(number: float, text: str) -> None:
    assert words.about(number) == text


def test_moments_are_seen_from_now() -> None:
    for seconds, text in ((1, "just now"), (30, "30 s ago"), (3599, "59 min ago"), (90_000, "1 d ago")):
        assert words.moment(NOW - timedelta(seconds=seconds), NOW).ago == text
    assert words.moment(NOW, NOW).full == "2026-05-04 12:00:00 UTC"


# -- the overview --


def activity(**changes: Any) -> Activity:
    base: dict[str, Any] = {
        "at": NOW,
        "workers": {"w1": Worker("completions", 10, 3)},
        "running": {},
        "abandoned": {},
        "waiting": [],
        "more_running": False,
        "more_waiting": False,
        "closed": {},
        "state": "{}",
    }
    return Activity(**(base | changes))


def told(*limits: Limit, age: float = 1.0, **tenants: int) -> Limits:
    return Limits(NOW - timedelta(seconds=age), list(limits), tenants, None)


def sums(minute: int, **changes: Any) -> Sums:
    base: dict[str, Any] = dict.fromkeys(
        ("completed", "failed", "other", "deltas", "prompt_tokens", "completion_tokens"), 0
    )
    values: dict[str, Any] = {"minute": minute, "cost": None, "first_outputs": (0,) * 9} | base | changes
    return Sums(**values)


def shown(seen: Activity, past: History | None = None, span: str = "1h") -> overview_view.OverviewView:
    nothing = History(NOW.timestamp(), [], [])
    return overview_view.show(overview_view.span_named(span), seen, past or nothing, past or nothing)


def test_the_summary_says_what_matters_most() -> None:
    assert shown(activity()).summary.text == "All is quiet: 1 worker is ready, and nothing waits."
    assert shown(activity(workers={})).summary.tone == "warn"
    running = {(("openai", "gpt"), "shop"): 3}
    assert shown(activity(running=running)).summary.text == "3 jobs run on 1 worker, and nothing waits."
    waiting = [Waiting("shop", "completions", "interactive", (("openai", "gpt"),), 7)]
    closed = {"openai": {"why": "concurrency", "running": 3, "most": 3}}
    busy = shown(activity(running=running, waiting=waiting, closed=closed))
    assert busy.summary.text == "3 jobs run on 1 worker; 7 jobs wait, most of them for provider openai: 3 of 3 streams."
    stuck = shown(activity(waiting=[waiting[0]._replace(queue="elsewhere")]))
    assert stuck.summary.tone == "bad"
    assert "none is alive for the queue 'elsewhere'" in stuck.summary.text
    assert stuck.reasons[0].advice


def test_what_runs_and_waits_is_told_by_target_tenant_reason_and_worker() -> None:
    seen = activity(
        running={(("openai", "gpt"), "shop"): 2, (("openai", "gpt"), "lab"): 1},
        waiting=[
            Waiting("shop", "completions", "interactive", (("openai", "gpt"),), 5, is_due=False),
            Waiting("lab", "completions", "bulk", (("other", "m"),), 1),
        ],
        closed={
            "openai/gpt": {"why": "cooling", "until": NOW.timestamp() + 30},
            "other": {"why": "cooling", "until": NOW.timestamp() - 1},
            "tenant:lab": {"running": 1, "most": 1},
        },
    )
    view = shown(seen)
    assert [(row.name, row.running, row.waiting) for row in view.targets] == [
        ("openai/gpt", "3", "5"),
        ("other/m", "0", "1"),
    ]
    assert [(row.name, row.running, row.waiting) for row in view.tenants] == [("shop", "2", "5"), ("lab", "1", "1")]
    assert [(row.name, row.closed and row.closed.tone) for row in view.limits] == [
        ("openai/gpt", "warn"),
        ("tenant lab", None),
    ]
    assert [(used.text, used.share) for used in view.limits[1].used] == [("1 of 1 jobs", 1.0)]
    assert [row.jobs for row in view.reasons] == ["5", "1"]
    assert [(row.name, row.words) for row in view.workers] == [("w1", "3 of 10")]
    assert [tile.value for tile in view.tiles][:2] == ["3", "6"]


def test_limits_say_what_is_used_of_what_is_allowed_and_until_when_one_is_closed() -> None:
    seen = activity(
        running={(("openai", "gpt"), "shop"): 2, (("openai", "mini"), "lab"): 1, (("other", "m"), "lab"): 3},
        closed={
            "openai": {"why": "tokens_per_minute", "until": NOW.timestamp() + 3},
            "other/m": {"why": "concurrency", "running": 3, "most": 3},
        },
        limits=told(
            Limit("openai", Used(9, 30), Used(12, 500, 500.0), Used(90_000, 80_000, 80_000.0)),
            Limit("openai/gpt", Used(2, 16, learned=True), None, None),
            Limit("other/m", Used(3, 3), None, None),
            Limit("unlimited/m", Used(0, None), None, None),
            shop=8,
        ),
    )
    view = shown(seen)
    assert [(row.name, [used.text for used in row.used], row.closed and row.closed.text) for row in view.limits] == [
        (
            "openai",
            ["3 of 30 streams", "12 of 500 requests, 500 a minute", "90,000 of 80,000 tokens, 80,000 a minute"],
            "tokens per minute; next at 12:00:03 UTC",
        ),
        ("other/m", ["3 of 3 streams"], None),
        ("tenant shop", ["2 of 8 jobs"], None),
        ("openai/gpt", ["2 of 16 streams (learned)"], None),
    ]
    assert view.limits_at == ""
    old = shown(activity(limits=told(Limit("p", Used(1, 2), None, None), age=3600)))
    assert old.limits_at == "2026-05-04 11:00:00 UTC"
    assert old.limits[0].used[0].text == "0 of 2 streams", "what runs now is counted now"


def test_a_cost_is_told_where_providers_report_one() -> None:
    unpriced = shown(activity(), History(NOW.timestamp(), [sums(MINUTE - 1, completed=3)], []))
    assert "cost" not in [chart.name for chart in unpriced.charts]
    assert "Cost" not in [tile.name for tile in unpriced.tiles]
    priced = History(NOW.timestamp(), [sums(MINUTE - 5, cost=0.5), sums(MINUTE - 4), sums(MINUTE - 3, cost=0.25)], [])
    view = shown(activity(), priced)
    assert [tile.value for tile in view.tiles if tile.name == "Cost"] == ["0.75"]
    (line,) = overview_view.series(overview_view.span_named("1h"), priced)["charts"]["cost"]
    assert [cost for cost in line if cost is not None] == [30.0, 15.0]
    paid = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2, details={"cost": 0.0125})
    assert job_view.Fact("Cost, says the provider", "0.0125") in job_view.show(result(usage=paid), NOW).facts
    assert not [fact for fact in job_view.show(result(), NOW).facts if fact.name.startswith("Cost")]


@pytest.mark.parametrize(
    ("money", "text"),
    [(0.0, "0"), (0.000_012_345, "0.0000123"), (0.125, "0.125"), (1.0, "1.00"), (1234.567, "1,234.57")],
)
def test_an_amount_of_money_is_short_and_not_nothing(money: float, text: str) -> None:
    assert words.amount(money) == text


def test_the_past_becomes_rates() -> None:
    at = MINUTE * 60 + 40.0
    past = History(
        at,
        [
            sums(MINUTE - 1, deltas=600, completed=6, failed=2, other=1, first_outputs=(0, 0, 8, 0, 0, 0, 0, 0, 0)),
            sums(MINUTE, deltas=400, completed=2),
        ],
        [Errors("rate_limited", "openai", "gpt", 2)],
    )
    span = overview_view.span_named("1h")
    series = overview_view.series(span, past)
    assert len(series["at"]) == 60
    assert series["at"][-1] == MINUTE * 60
    assert series["charts"]["deltas"][0][-2:] == [10.0, 10.0]  # 600 in a minute, 400 in the 40 s since
    assert [line[-2] for line in series["charts"]["attempts"]] == [6, 2, 1]
    assert series["charts"]["first"][0][-2:] == [0.35, None]
    assert series["charts"]["first"][0][0] is None
    view = overview_view.show(span, activity(), past, past)
    assert view.tiles[2].value == "10"
    assert view.tiles[4] == overview_view.Tile("Failed attempts", "2", "of 11, last hour")
    assert [row.at for row in view.figures.rows] == ["05-04 12:00", "05-04 11:59"]
    assert view.errors == [
        overview_view.ErrorRow("rate_limited", "/jobs?error=rate_limited&provider=openai&model=gpt", "openai/gpt", "2")
    ]


def test_a_step_that_has_just_begun_says_nothing_yet() -> None:
    past = History(MINUTE * 60 + 5.0, [sums(MINUTE, deltas=1)], [])
    assert overview_view.series(overview_view.span_named("1h"), past)["at"][-1] == (MINUTE - 1) * 60


@pytest.mark.parametrize("span", overview_view.SPANS)
def test_a_span_has_few_points_and_ends_now(span: overview_view.Span) -> None:
    series = overview_view.series(span, History(NOW.timestamp() + 59, [], []))
    assert 60 <= len(series["at"]) <= 168
    assert NOW.timestamp() - series["at"][-1] < span.step * 60


def test_quantiles() -> None:
    assert overview_view.quantile((0,) * 9, 0.5) is None
    assert overview_view.quantile((10, 0, 0, 0, 0, 0, 0, 0, 0), 0.5) == 0.05
    assert overview_view.quantile((0, 0, 0, 0, 0, 0, 0, 0, 4), 0.5) == 30.0


# -- jobs --


def summary(**changes: Any) -> JobSummary:
    base: dict[str, Any] = {
        "id": "job-1",
        "tenant": "shop",
        "status": JobStatus.COMPLETED,
        "model": "gpt",
        "provider": "openai",
        "prompt_start": "Hello",
        "created_at": NOW,
        "attempt": 1,
    }
    return JobSummary(**(base | changes))


def test_what_is_asked_for_goes_into_addresses_and_back() -> None:
    ask = jobs_view.asked({"q": " hello & <you> ", "tenant": "shop", "status": "failed", "unknown": "x"})
    address = ask.address(Place("shop", "job-9"))
    assert "before=shop%2Fjob-9" in address
    assert jobs_view.asked({"before": "shop/job-9"}).place == Place("shop", "job-9")
    for nonsense in ("", "shop", "/x", "shop/", "a/\0", "a/b/c"):
        assert jobs_view.asked({"before": nonsense}).place is None
    assert ask.q == "hello & <you>"
    assert jobs_view.asked({}).address() == "/jobs"


def test_what_is_asked_for_becomes_filters() -> None:
    wanted = jobs_view.wanted(jobs_view.asked({"status": "open", "since": "1h", "q": "x"}), NOW)
    assert set(wanted.statuses) == {JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.RETRYING}
    assert wanted.since == NOW - timedelta(hours=1)
    assert wanted.containing == "x"
    assert not jobs_view.wanted(jobs_view.asked({"status": "nonsense", "since": "nonsense"}), NOW).is_selective


def test_a_row_says_why_a_job_waits_or_failed() -> None:
    jobs = JobPage(
        [
            summary(status=JobStatus.QUEUED, waiting_for=WaitingFor(cause="worker", text="a worker")),
            summary(status=JobStatus.FAILED, error=ErrorInfo(code="timeout", message="too slow"), prompt_start=""),
        ]
    )
    view = jobs_view.show(jobs_view.asked({}), jobs, Place("shop", "job-1"), ["shop"], NOW)
    assert [(row.note, row.is_bad) for row in view.jobs] == [("waits for a worker", True), ("timeout: too slow", True)]
    assert view.jobs[1].title == "job-1"
    assert view.older == "/jobs?before=shop%2Fjob-1"


# -- one job --


def result(**changes: Any) -> CompletionResult:
    base: dict[str, Any] = {
        "id": "job-1",
        "tenant": "shop",
        "status": JobStatus.COMPLETED,
        "model": "gpt",
        "provider": "openai",
        "request": {"model": "gpt", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5},
        "created_at": NOW,
        "started_at": NOW + timedelta(seconds=1),
        "finished_at": NOW + timedelta(seconds=10),
        "attempt": 1,
        "choices": [Choice(index=0, content="Hi", finish_reason="stop")],
        "usage": Usage(prompt_tokens=5, completion_tokens=7, total_tokens=12, source=UsageSource.PROVIDER),
        "output_sha256": "a" * 64,
        "attempts": [
            AttemptResult(
                number=1,
                reason="first",
                outcome="finished",
                provider="openai",
                model="gpt",
                started_at=NOW + timedelta(seconds=1),
                finished_at=NOW + timedelta(seconds=10),
                first_token_ms=2000.0,
            )
        ],
    }
    return CompletionResult(**(base | changes))


def test_an_attempt_lies_on_the_time_line_where_it_was() -> None:
    (attempt,) = job_view.show(result(), NOW).attempts
    assert (attempt.bar.start, attempt.bar.first, attempt.bar.end) == (100.0, 300.0, 1000.0)
    assert attempt.took == "9.0 s"
    running = result(
        status=JobStatus.RUNNING,
        finished_at=None,
        attempts=[result().attempts[0].model_copy(update={"finished_at": None, "outcome": None})],
    )
    (attempt,) = job_view.show(running, NOW + timedelta(seconds=20)).attempts
    assert (attempt.bar.start, attempt.bar.end, attempt.outcome.word) == (50.0, 1000.0, "running")


def test_a_page_without_scripts_has_what_has_come_so_far() -> None:
    running = result(status=JobStatus.RUNNING, finished_at=None, choices=[])
    assert job_view.show(running, NOW).answers == []
    still = job_view.show(running, NOW, [Choice(index=0, content="It begins", reasoning="Hm.")])
    assert (still.is_still, [answer.content for answer in still.answers]) == (True, ["It begins"])
    assert not job_view.show(result(), NOW, []).is_still, "what is stored is better"


def test_what_can_be_done_depends_on_the_status() -> None:
    running, done = job_view.show(result(status=JobStatus.RUNNING), NOW), job_view.show(result(), NOW)
    assert (running.is_live, running.may_cancel, running.may_retry) == (True, True, False)
    assert (done.is_live, done.may_cancel, done.may_retry, done.retry_word) == (False, False, True, "Run again")
    refused = result(status=JobStatus.FAILED, error=ErrorInfo(code="invalid_job", message="no"), choices=[])
    assert not job_view.show(refused, NOW).may_retry


def test_extras_are_shown_as_what_they_are() -> None:
    extra = {
        "images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
        "audio": {"data": "UklGRg==", "format": "wav"},
        "annotations": [
            {"type": "url_citation", "url_citation": {"url": "https://example.org/", "title": "Example"}},
            {"type": "url_citation", "url_citation": {"url": "javascript:alert(1)", "title": "no"}},
        ],
        "signature": "abc",
        "left_out": {"images": "too large"},
    }
    call = ToolCall(id="c1", name="weather", arguments="{}", arguments_valid=True)
    (answer,) = job_view.show(result(choices=[Choice(index=0, extra=extra, tool_calls=[call])]), NOW).answers
    assert [picture.source for picture in answer.pictures] == ["data:image/png;base64,iVBORw0KGgo="]
    assert [sound.source for sound in answer.sounds] == ["data:audio/wav;base64,UklGRg=="]
    assert [link.address for link in answer.links] == ["https://example.org/"]
    assert answer.extra_names == "signature"
    assert answer.left_out == "images: too large"
    assert [each.name for each in answer.calls] == ["weather"]


def test_an_image_from_elsewhere_is_not_loaded() -> None:
    for address in ("https://example.org/spy.png", "data:image/svg+xml;base64,AAAA", "data:text/html;base64,AAAA"):
        extra = {"images": [{"image_url": {"url": address}}]}
        (answer,) = job_view.show(result(choices=[Choice(index=0, extra=extra)]), NOW).answers
        assert not answer.pictures
        assert address in answer.extra


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": "x"}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, {"role": "tool", "content": "42"}],
        ["nonsense", {"content": {"odd": 1}}, {"role": 3, "content": 4}],
        None,
        {},
    ],
)
def test_any_request_can_be_shown(messages: Any) -> None:
    request = {"model": "gpt", "messages": messages}
    view = job_view.show(result(request=request), NOW)
    assert len(view.messages) == (len(messages) if isinstance(messages, list) else 0)
    Pages().render("job.html", session=HERE, here="/jobs", view=view, problem="")


def test_a_huge_text_is_cut_and_says_so() -> None:
    (answer,) = job_view.show(result(choices=[Choice(index=0, content="x" * 300_000)]), NOW).answers
    assert len(answer.content) < 201_000
    assert answer.content.endswith("more; the JSON has all of it]")


def test_a_value_is_written_no_further_than_it_is_shown() -> None:
    """A line of a deeply nested one has more spaces than the value has digits."""
    seen = 0

    class Counting(list[int]):
        def __iter__(self) -> Iterator[int]:
            nonlocal seen
            for item in super().__iter__():
                seen += 1
                yield item

    value: Any = Counting([1] * 100_000)
    for _ in range(100):
        value = [value]
    text = words.pretty({"x": value}, 20_000)
    assert text.startswith('{\n  "x": [')
    assert text.endswith("[more; the JSON has all of it]")
    assert len(text) < 20_100
    assert seen < 1000
    assert words.pretty({"x": [1]}, 20) == '{\n  "x": [\n    1\n  ]\n}'[:20] + "\n\n[more; the JSON has all of it]"
    assert words.pretty({"x": [1]}, 100) == '{\n  "x": [\n    1\n  ]\n}'


def test_of_very_many_messages_the_last_are_shown() -> None:
    request = {"model": "m", "x" * 1000: 1, "y" * 1000: 2}
    many = [{"role": "user", "content": str(number)} for number in range(20_000)]
    view = job_view.show(result(request=request | {"messages": many}), NOW)
    assert [block.text for message in view.messages for block in message.blocks] == [
        "[19,500 earlier messages; the JSON has all of them]",
        *map(str, range(19_500, 20_000)),
    ]
    assert len(view.parameter_names) < 400
    parts = [{"type": "text", "text": "x"}] * 20_000
    (message,) = job_view.show(result(request=request | {"messages": [{"content": parts}]}), NOW).messages
    assert len(message.blocks) <= 1001
    long = [{"role": "user", "content": "x" * 150_000} for _ in range(40)]
    view = job_view.show(result(request=request | {"messages": long}), NOW)
    assert sum(len(block.text) for message in view.messages for block in message.blocks) < 2_500_000


# -- pages --


def pages_with(text: str) -> dict[str, str]:
    """All pages, with a text of somebody else's wherever there can be one."""
    extra = {"annotations": [{"url": f"https://x/{text}", "title": text}], text: text, "left_out": {text: text}}
    call = ToolCall(id=text, name=text, arguments=text, arguments_valid=False)
    attempt = (
        result()
        .attempts[0]
        .model_copy(update={"error": ErrorInfo(code=text, message=text), "worker": text, "provider_request_id": text})
    )
    job = result(
        model=text,
        request={"messages": [{"role": text, "content": text, text: text}], text: text},
        metadata={text: text},
        choices=[Choice(index=0, content=text, reasoning=text, refusal=text, extra=extra, tool_calls=[call])],
        attempts=[attempt],
        error=ErrorInfo(code=text, message=text),
        waiting_for=WaitingFor(cause="retry", text=text),
    )
    listed = summary(prompt_start=text, model=text, error=ErrorInfo(code=text, message=text), status=JobStatus.FAILED)
    ask = jobs_view.asked({"q": text, "tenant": text, "provider": text, "model": text})
    seen = activity(
        workers={text: Worker(text, 1, 1)},
        running={((text, text), text): 1},
        waiting=[Waiting(text, text, "bulk", ((text, text),), 1)],
        closed={text: {"why": text}},
    )
    past = History(NOW.timestamp(), [], [Errors(text, text, text, 1)])
    rejected = [RejectedMessage("1", NOW, text, text, text, 3)]
    here: dict[str, Any] = {"session": Session("1", text, text), "here": "/"}
    pages = Pages()
    rendered = {
        "overview.html": pages.render("overview.html", view=shown(seen, past), spans=overview_view.SPANS, **here),
        "jobs.html": pages.render(
            "jobs.html", view=jobs_view.show(ask, JobPage([listed]), None, [text], NOW, text), **here
        ),
        "job.html": pages.render("job.html", view=job_view.show(job, NOW), problem=text, **here),
        "rejected.html": pages.render("rejected.html", view=rejected_view.show(rejected, NOW, is_first=False), **here),
        "login.html": pages.render("login.html", next=text, problem=text),
        "problem.html": pages.render("problem.html", title=text, message=text, again=text),
        "onward.html": pages.render("onward.html", address=text),
    }
    return {name: bytes(response.body).decode() for name, response in rendered.items()}


@pytest.mark.parametrize("attack", [ATTACK, '"><img src=x onerror=alert(1)>', "' autofocus onfocus='alert(1)"])
def test_what_others_wrote_is_text(attack: str) -> None:
    for name, html in pages_with(attack).items():
        assert attack not in html, name


def test_no_page_has_a_script_or_style_in_itself() -> None:
    for name, html in pages_with("x").items():
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=\"/assets/)|javascript:", html), name
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//(?!x/x)", html), name


def test_a_page_may_load_nothing_from_elsewhere() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_files_of_others_are_as_they_were_published() -> None:
    table = (ASSETS / "vendor" / "README.md").read_text()
    listed = re.findall(r"^\| `([^`]+)` .* `([0-9a-f]{64})` \|$", table, re.MULTILINE)
    here = {path.name for path in (ASSETS / "vendor").iterdir() if path.suffix in {".js", ".css"}}
    assert {name for name, _ in listed} == here
    for name, sha256 in listed:
        assert hashlib.sha256((ASSETS / "vendor" / name).read_bytes()).hexdigest() == sha256, name
