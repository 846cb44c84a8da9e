"""What goes on is drawn from what was looked at, and fits its console."""

import json
import re
import sys
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from keepstream.client.overview import COUNTED, Activity, Waiting
from keepstream.client.waiting import Worker
from keepstream_worker.commands.activity import Picture, as_json, draw, limits_json
from keepstream_worker.commands.activity_view import screen, show_limits
from keepstream_worker.limits import Limits, Policy, ProviderPolicy, TenantPolicy
from keepstream_worker.scheduling.learning import TargetState
from keepstream_worker.scheduling.state import State
from keepstream_worker.values import Target

AT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
A, B = Target("openai", "a"), Target("other", "b")
WORKER = Worker("q", places=10, running=5)
POLICY = Policy(
    {"openai": ProviderPolicy(Limits(concurrency=5), {"a": Limits(concurrency=4), "b*": Limits(tokens_per_minute=9)})},
    {"acme": TenantPolicy(concurrency=2, weight=3)},
)


def waits(tenant: str, *chain: Target, jobs: int = 1, is_due: bool = True, queue: str = "q") -> Waiting:
    return Waiting(tenant, queue, "interactive", chain, jobs, is_due)


def picture(*waiting: Waiting, policy: Policy = POLICY, **changes: Any) -> Picture:
    seen = {
        "at": AT,
        "workers": {"w": WORKER},
        "running": {},
        "abandoned": {},
        "more_running": False,
        "more_waiting": False,
        "closed": {},
        "state": "{}",
    }
    return draw(Activity(**{**seen, "waiting": list(waiting), **changes}), policy)


def text(what: Any, width: int = 80) -> list[str]:
    console = Console(width=width, height=24, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get().splitlines()


def test_jobs_are_counted_by_target_and_by_tenant() -> None:
    drawn = picture(
        waits("acme", A, B, jobs=3), waits("acme", B), waits("b", A), running={(A, "acme"): 2, (A, "b"): 1, (B, "c"): 1}
    )
    assert [(row.name, row.running, row.most, row.waiting) for row in drawn.targets] == [
        ("openai/a", 3, 4, 4),
        ("other/b", 1, 16, 1),  # learned
    ]
    assert [(row.name, row.running, row.most, row.waiting) for row in drawn.tenants] == [
        ("acme", 2, 2, 4),
        ("b", 1, None, 1),
        ("c", 1, None, 0),
    ]
    assert (drawn.running, drawn.waiting, drawn.places) == (4, 5, 10)


def lines_to_draw(targets: int) -> int:
    """Return how many lines are executed to draw so many targets and tenants."""
    waiting = [waits(f"tenant-{number}", Target("p", f"m{number}")) for number in range(targets)]
    lines = 0

    def count(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        picture(*waiting, policy=Policy())
    finally:
        sys.settrace(before)
    return lines


def test_very_many_targets_and_tenants_are_drawn_in_one_pass() -> None:
    assert lines_to_draw(400) < 3 * lines_to_draw(200)


FULL = {"openai": {"why": "concurrency", "running": 5, "most": 5}}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "pickup"),
        ({"closed": FULL}, "concurrency"),
        ({"closed": {"tenant:acme": {"why": "tenant", "running": 2, "most": 2}}}, "tenant"),
        ({"workers": {"w": WORKER._replace(running=10)}}, "place"),
        ({"workers": {"w": WORKER._replace(running=10)}, "closed": FULL}, "concurrency"),
        ({"workers": {"w": WORKER._replace(queue="another")}}, "worker"),
        ({"workers": {}}, "worker"),
    ],
)
def test_what_waits_says_why(changes: dict[str, Any], cause: str) -> None:
    drawn = picture(waits("acme", A, jobs=2), **changes)
    for row in (*drawn.targets, *drawn.tenants):
        assert row.waits_for is not None
        assert row.waits_for.cause == cause


def test_most_of_those_that_wait_decide_what_is_shown() -> None:
    drawn = picture(waits("a", A, jobs=2), waits("a", B, jobs=3), waits("b", A, jobs=1, is_due=False), closed=FULL)
    assert [row.waits_for and row.waits_for.cause for row in drawn.tenants] == ["pickup", "retry"]
    assert [row.waits_for and row.waits_for.cause for row in drawn.targets] == ["concurrency", "pickup"]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 16), (200, 60), (40, 12)])
@pytest.mark.parametrize("many", [0, 1, 5, 100])
def test_the_screen_fits_its_console(width: int, height: int, many: int) -> None:
    names = [f"tenant-with-a-long-name-{number}" for number in range(many)]
    drawn = picture(
        *(waits(name, Target("provider", f"a-model-with-a-long-name-{name}"), jobs=COUNTED) for name in names),
        running={(A, name): 1 for name in names},
        closed=FULL,
    )
    lines = text(screen(drawn, width, height), width)
    assert len(lines) <= height
    assert all(len(line.rstrip()) <= width for line in lines)
    assert any("waiting" in line for line in lines)


LATER = {"until": AT.timestamp() + 8.0}
REASONS = {
    "openai/gpt-6-mini": ({"why": "broken", **LATER}, "broken; next try at 12:00:08 UTC"),
    "openai/gpt-6-large": ({"why": "cooling", **LATER}, "cool-down until 12:00:08 UTC"),
    "a-gateway/vendor/model-1": ({"why": "tokens_per_minute", **LATER}, "tokens per minute; next at 12:00:08 UTC"),
}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_reasons_are_whole_on_usual_terminals(width: int, height: int) -> None:
    targets = [Target(*name.split("/", 1)) for name in REASONS]
    nobody = "a worker: none is alive for the queue 'completions'"
    drawn = picture(
        *(waits("acme", target, jobs=9) for target in targets),
        waits("umbrella", A, jobs=COUNTED, queue="completions"),
        running={(target, "acme"): 16 for target in targets},
        closed={name: closed for name, (closed, _) in REASONS.items()},
    )
    lines = [line.rstrip() for line in text(screen(drawn, width, height), width)]
    assert len(lines) <= height
    assert all(
        any(line.endswith(words) for line in lines) for words in [nobody, *(words for _, words in REASONS.values())]
    )
    assert not any("…" in line for line in lines)


def test_the_screen_says_how_many_it_leaves_out_and_what_is_not_counted() -> None:
    drawn = picture(*(waits(f"t{number}", A, jobs=COUNTED) for number in range(100)), more_waiting=True)
    shown = "\n".join(text(screen(drawn, 80, 24)))
    assert f"over {COUNTED} waiting" in shown
    assert "more" in shown


def test_trouble_takes_the_place_of_the_numbers() -> None:
    lines = text(screen(picture(), 80, 24, "the database does not answer"))
    assert lines[0].rstrip() == "12:00:00 UTC  the database does not answer"


def test_a_name_cannot_steer_the_console() -> None:
    assert "\x1b" not in "".join(text(screen(picture(waits("a", Target("p", "m\x1b[2J"))), 80, 24)))


def shown_limits(drawn: Picture, *doubts: str, width: int = 80) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        show_limits(console, drawn, doubts)
    return [re.sub(r" {2,}", "  ", line.rstrip()) for line in captured.get().splitlines()]


def test_limits_that_nobody_uses_yet_are_shown_too() -> None:
    drawn = picture(waits("acme", A, jobs=3), running={(A, "acme"): 2})
    document = limits_json(drawn)
    shown = {row["name"]: row for row in document["limits"]}
    assert set(shown) == {"openai", "openai/a"}
    assert [(shown[name]["streams"]["used"], shown[name]["streams"]["allowed"]) for name in shown] == [(2, 5), (2, 4)]
    assert shown["openai"]["waiting"] == 3
    lines = shown_limits(drawn, "a doubt")
    assert "openai  2 of 5 streams  3" in lines
    assert "acme  2 of 2 jobs; weight 3  3" in lines
    assert "a doubt" in lines


def test_a_pattern_is_no_target() -> None:
    drawn = picture(running={(Target("openai", "b-1"), "acme"): 1})
    document = limits_json(drawn)
    assert document["patterns"] == [
        {"name": "openai/b*", "concurrency": None, "requests_per_minute": None, "tokens_per_minute": 9}
    ]
    (target,) = (row for row in document["limits"] if row["name"] == "openai/b-1")
    assert target["tokens"]["per_minute"] == 9
    lines = shown_limits(drawn)
    assert "openai/b*  9 tokens a minute" in lines


CLOSED = {
    "cooling": (TargetState(cooling_until=AT.timestamp() + 5), "cool-down until 12:00:05 UTC", "2026-01-01T12:00:05Z"),
    "broken": (
        TargetState(broken_until=AT.timestamp() + 5),
        "broken; next try at 12:00:05 UTC",
        "2026-01-01T12:00:05Z",
    ),
    "probing": (
        TargetState(broken_until=AT.timestamp() - 5, probe_at=AT.timestamp() - 1),
        "broken; one job is trying it",
        None,
    ),
}


@pytest.mark.parametrize("why", CLOSED)
def test_what_is_closed_says_until_when(why: str) -> None:
    learned, words, until = CLOSED[why]
    state = State()
    state.use("other/b").learned = learned
    drawn = picture(policy=Policy(), state=state.to_json())
    (row,) = json.loads(json.dumps(limits_json(drawn)))["limits"]
    assert row["closed"] == {"why": why, "until": until}
    first, second, *_ = shown_limits(drawn)[1:]
    assert first.startswith("other/b  0 of 16 streams (learned)")
    assert second.strip() == words


def test_what_is_used_has_one_notation_and_a_debt_says_when_it_is_paid() -> None:
    rates = Limits(concurrency=3, requests_per_minute=600, tokens_per_minute=2_000_000)
    state = State()
    state.use("openai").requests = AT.timestamp() - 2
    state.use("openai").tokens = AT.timestamp() + 6
    drawn = picture(policy=Policy({"openai": ProviderPolicy(rates)}), running={(A, "a"): 1}, state=state.to_json())
    assert [line.strip() for line in shown_limits(drawn)[1:5]] == [
        "openai  1 of 3 streams  0",
        "9 of 28 requests, 600 a minute",
        "285,000 of 95,000 tokens, 2,000,000 a minute",
        "tokens per minute; next at 12:00:06 UTC",
    ]


def test_nothing_limited_is_said() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        show_limits(console, picture(policy=Policy()), [])
    assert captured.get().startswith("no provider has a limit")


def test_a_picture_is_json() -> None:
    drawn = picture(waits("acme", A, jobs=2), running={(A, "b"): 1}, closed=FULL)
    document = json.loads(json.dumps(as_json(drawn)))
    assert (document["running"], document["waiting"], document["workers"]) == (1, 2, [{"id": "w", **WORKER._asdict()}])
    assert document["targets"][0]["waits_for"]["cause"] == "concurrency"
    assert json.loads(json.dumps(limits_json(drawn)))["tenants"][0]["name"] == "acme"
