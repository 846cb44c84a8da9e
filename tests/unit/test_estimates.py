"""What a request may cost is estimated without asking anybody."""

from typing import Any

import pytest

from keepstream.estimates import most_answer_tokens, prompt_tokens


@pytest.mark.parametrize(
    ("messages", "tokens"),
    [
        ([], 0),
        ([{"role": "user", "content": "x"}], 1),
        ([{"role": "system", "content": "x" * 8}, {"role": "user", "content": "ä" * 4}], 4),
        ([{"role": "user", "content": [{"type": "text", "text": "x" * 8}, {"type": "image_url", "image_url": {}}]}], 2),
        ([{"role": "user", "content": ({"text": "x" * 8}, "no part", {"text": 5})}], 2),
        ([{"role": "assistant", "content": None}, {"role": "user", "content": "\ud800"}, {}], 1),
    ],
)
def test_a_prompt_has_a_token_for_four_bytes_of_text(messages: list[Any], tokens: int) -> None:
    assert prompt_tokens({"messages": messages}) == tokens


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_output_tokens": 6}, 6),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
        ({"max_tokens": 10_000_000}, None),  # "as much as you like"
        *(({"max_tokens": wrong}, None) for wrong in (0, -1, True, "5", 5.0, [5], 10**30)),
    ],
)
def test_a_request_may_bound_its_answer(request_: dict[str, Any], tokens: int | None) -> None:
    assert most_answer_tokens(request_) == tokens
