"""What makes a request no job is named as the client knows it."""

import pytest

from keepstream.errors import InvalidJobError
from keepstream.jobs import make_job
from keepstream_gateway.openai.submission import refusal_of

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"request": REQUEST | {"model": 7}}, "model"),
        ({"request": {"messages": []}}, "model"),
        ({"request": REQUEST | {"messages": []}}, "messages"),
        ({"request": REQUEST | {"messages": ["Hi"]}}, "messages"),
        ({"request": REQUEST | {"base_url": "http://localhost"}}, "base_url"),
        ({"request": REQUEST, "max_attempts": 0}, "keepstream.max_attempts"),
        ({"request": REQUEST, "max_atempts": 3}, "keepstream.max_atempts"),
        ({"request": REQUEST, "fallbacks": [{"provider": "p"}]}, "keepstream.fallbacks"),
    ],
)
def test_the_parameter_that_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidJobError) as refused:
        make_job(fields)
    error = refusal_of(str(refused.value))
    assert (error.status, error.param) == (400, param)
    assert not error.message.startswith("request:")
