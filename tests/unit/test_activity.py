"""What goes on is drawn from what was looked at, and fits its console."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from keepstream.client.waiting import Worker
from keepstream_worker.commands.activity import Picture, as_json, draw, limits_json
from keepstream_worker.commands.activity_view import screen, show_limits
from keepstream_worker.limits import Limits, Policy, ProviderPolicy, TenantPolicy
from keepstream_worker.store.activity import COUNTED, Activity, Waiting
from keepstream_worker.values import Target

AT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
A, B = Target("openai", "a"), Target("other", "b")
WORKER = Worker("q", places=10, running=5)
POLICY = Policy(
    {"openai": ProviderPolicy(Limits(concurrency=5), {"a": Limits(concurrency=4), "b*": Limits(tokens_per_minute=9)})},
    {"acme": TenantPolicy(concurrency=2, weight=3)},
)


def waits(tenant: str, *chain: Target, jobs: int = 1, not_due: int = 0, queue: str = "q") -> Waiting:
    return Waiting(tenant, queue, "interactive", chain, jobs, not_due)


def picture(*waiting: Waiting, policy: Policy = POLICY, **changes: Any) -> Picture:
    seen = {
        "at": AT,
        "workers": {"w": WORKER},
        "running": {},
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
        ("other/b", 1, None, 1),
    ]
    assert [(row.name, row.running, row.most, row.waiting) for row in drawn.tenants] == [
        ("acme", 2, 2, 4),
        ("b", 1, None, 1),
        ("c", 1, None, 0),
    ]
    assert (drawn.running, drawn.waiting, drawn.places) == (4, 5, 10)


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
    drawn = picture(waits("a", A, jobs=2), waits("a", B, jobs=3), waits("b", A, jobs=1, not_due=1), closed=FULL)
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


def test_limits_that_nobody_uses_yet_are_shown_too() -> None:
    drawn = picture(waits("acme", A, jobs=3), running={(A, "acme"): 2})
    shown = {row["name"]: row for row in limits_json(drawn)["limits"]}
    assert set(shown) == {"openai", "openai/a", "openai/b*"}
    assert [(shown[name]["running"], shown[name]["concurrency"]) for name in ("openai", "openai/a")] == [(2, 5), (2, 4)]
    assert shown["openai"]["waiting"] == 3
    console = Console(width=80)
    with console.capture() as captured:
        show_limits(console, drawn, ["a doubt"])
    assert "2 of 5" in captured.get()
    assert "2 of 2" in captured.get()
    assert "a doubt" in captured.get()


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
