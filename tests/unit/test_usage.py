"""Usage: what is reported is kept, and estimates learn from it."""

from types import SimpleNamespace
from typing import Any

import pytest

from keepstream.client.endings import sum_usage
from keepstream.results import Choice, Usage, UsageSource
from keepstream_worker.jobs.usage import PromptSizes, estimated, reported


def asking(text: str, model: str = "m", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def test_an_estimate_is_a_quarter_of_the_bytes_until_something_is_known() -> None:
    sizes = PromptSizes()
    assert sizes.tokens("p", asking("x" * 400)) == 100
    assert sizes.tokens("p", asking("é" * 3)) == 2
    assert sizes.tokens("p", {"model": "m"}) == 0
    assert estimated(7, [Choice(index=0, content="x" * 9)]) == Usage(
        prompt_tokens=7, completion_tokens=3, total_tokens=10, source=UsageSource.ESTIMATED
    )
    assert estimated(7, [Choice(index=0)]) == Usage()


def test_an_estimate_learns_from_what_the_provider_counted() -> None:
    sizes = PromptSizes()
    sizes.learn("p", asking("x" * 2000), 1000)
    assert sizes.tokens("p", asking("x" * 400)) == 200
    sizes.learn("p", asking("x" * 6000), 1000)
    assert sizes.tokens("p", asking("x" * 400)) == 100


def test_each_provider_and_model_has_its_own_ratio() -> None:
    sizes = PromptSizes()
    sizes.learn("p", asking("x" * 2000), 1000)
    assert sizes.tokens("p", asking("x" * 400, model="other")) == 100
    assert sizes.tokens("q", asking("x" * 400)) == 100


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        (asking("x" * 900), 900),  # too little to tell
        (asking("x" * 2000, tools=[{"type": "function"}]), 1000),
        (asking("x" * 2000), None),
        (asking("x" * 2000), 0),
        ({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 1000),
        ({"model": "m", "messages": [{"role": "user", "content": "x" * 2000, "tool_calls": [{}]}]}, 1000),
        ({"model": "m", "messages": "odd"}, 1000),
        ({"model": "m", "messages": [None]}, 1000),
    ],
)
def test_nothing_is_learned_from_what_says_nothing_of_text(request_: dict[str, Any], tokens: int | None) -> None:
    sizes = PromptSizes()
    sizes.learn("p", request_, tokens)
    assert sizes.tokens("p", asking("x" * 400)) == 100


def test_an_absurd_count_does_not_spoil_the_estimate() -> None:
    sizes = PromptSizes()
    sizes.learn("p", asking("x" * 2000), 10**9)
    assert sizes.tokens("p", asking("x" * 400)) == 400
    sizes.learn("q", asking("x" * 2_000_000), 1)
    assert sizes.tokens("q", asking("x" * 1600)) == 100


@pytest.mark.parametrize("absurd", [-1, 2**31, 2**63 - 1])
def test_a_count_that_cannot_be_is_unknown(absurd: int) -> None:
    """One that is believed charges the target's bucket, the tenant's lane and the mean of its answers."""
    figures = {"prompt_tokens": 7, "completion_tokens": absurd, "total_tokens": absurd}
    assert reported(figures) == Usage(prompt_tokens=7, source=UsageSource.PROVIDER, details=figures)


def test_what_was_learned_long_ago_fades() -> None:
    sizes = PromptSizes()
    for _ in range(20):
        sizes.learn("p", asking("x" * 2_000_000), 2_000_000)
    for _ in range(40):
        sizes.learn("p", asking("x" * 2_000_000), 500_000)
    assert sizes.tokens("p", asking("x" * 400)) == pytest.approx(100, abs=2)


def attempt(usage: dict[str, Any] | None, **fields: Any) -> SimpleNamespace:
    known = {"http_status": None, "outcome": "finished", "usage_source": "provider", "usage": usage}
    counts = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return SimpleNamespace(**known | counts | fields)


def test_a_jobs_usage_sums_every_figure_of_its_reports() -> None:
    first = {
        "prompt_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": None},
        "completion_tokens_details": {"reasoning_tokens": 7},
        "cost": 0.1,
        "cost_details": {"upstream_inference_cost": 0.1},
        "is_byok": False,
        "tokens_per_second": 9.5,
        "tier": "a",
    }
    second = {
        "prompt_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 2},
        "cost": 0.2,
        "odd": [1],
    }
    total = sum_usage([attempt(first), attempt(None), attempt(second), attempt({"cost": 5.0}, http_status=400)])
    assert total is not None
    assert total.details == {
        "prompt_tokens_details": {"cached_tokens": 7, "audio_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 7},
        "cost": 0.3,
        "cost_details": {"upstream_inference_cost": 0.1},
    }


def test_a_job_without_reported_details_has_none() -> None:
    total = sum_usage([attempt(None), attempt({"prompt_tokens": 3, "completion_tokens": 1})])
    assert total is not None
    assert total.details is None
