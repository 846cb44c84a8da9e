"""The provider's own words: kept, cut, and without keys."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.results import ProviderError
from keepstream_worker.providers.failures import failure_from_response, failure_from_stream_error
from keepstream_worker.providers.words import without


def said(body: Any, status: int = 400) -> dict[str, str]:
    words = failure_from_response(status, {}, body).provider_error
    return {} if words is None else words.model_dump(exclude_none=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"error": {"message": "Unsupported value", "type": "invalid_request_error", "param": "n", "code": None}},
            {"message": "Unsupported value", "type": "invalid_request_error", "param": "n"},
        ),
        ({"error": {"message": "x", "code": 400}}, {"message": "x", "code": "400"}),
        ({"error": "model is gone"}, {"message": "model is gone"}),
        ({"detail": "Not Found"}, {"message": "Not Found"}),
        (
            {"detail": [{"loc": ["body", "temperature"], "msg": "not a number", "type": "float_parsing"}]},
            {"message": "not a number", "type": "float_parsing", "param": "body.temperature"},
        ),
        ([{"error": {"message": "x", "status": "INVALID_ARGUMENT"}}], {"message": "x", "code": "INVALID_ARGUMENT"}),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": '{"error":{"message":"real"}}'}}},
            {"message": "real"},
        ),
        (b"<html><body><h1>502</h1>\n\nBad  Gateway</body></html>", {"message": "502 Bad Gateway"}),
        (b"plain words", {"message": "plain words"}),
        ({"base_resp": {"status_code": 2013, "status_msg": "bad n"}}, {"message": "bad n", "code": "base_resp_2013"}),
        ({"error": {"message": "a\x00b\ud83d"}}, {"message": "ab\ufffd"}),
        ({"error": {"message": {"odd": 1}}}, {}),
        (None, {}),
        ({}, {}),
        (b"", {}),
    ],
)
def test_what_the_provider_says_is_kept(body: Any, words: dict[str, str]) -> None:
    assert said(body) == words


def test_an_error_in_a_stream_keeps_its_words_too() -> None:
    words = failure_from_stream_error({"error": {"message": "why", "param": "p"}}).provider_error
    assert words == ProviderError(message="why", param="p")


KEYS = [
    "sk-proj-abcdef",
    "sk-or-v1-0123456789abcdef",
    "sk-ab***********wxyz",
    "abcd****wxyz",
    "gsk_abcdefghijkl",
    "AIzaSyA1234567890",
    "eyJhbGciOi.eyJzdWIi.c2ln",
    "0123456789abcdef0123456789abcdef",
    "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZg==",
    "xai-abcdefgh",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("field", ["message", "type", "code", "param"])
def test_what_looks_like_a_key_is_removed(field: str, key: str) -> None:
    text = said({"error": {field: f"Incorrect API key provided: {key}. See x.test"}})[field]
    assert key not in text
    assert "Incorrect API key provided: [removed]" in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Authorization: Bearer abc123", "abc123"),
        ("header x-api-key=abc", "abc"),
        ('{"api_key": "hello"} is wrong', "hello"),
        ("https://u:pw@x.test/v1?key=abc&n=1", "abc"),
        ("https://u:pw@x.test/v1?key=abc&n=1", "pw@"),
        ("password: hunter2", "hunter2"),
    ],
)
def test_what_is_named_a_secret_is_removed(text: str, kept: str) -> None:
    assert kept not in said({"error": {"message": text}})["message"]


@pytest.mark.parametrize(
    "text",
    [
        "The model `claude-3-5-sonnet-20241022-v2` does not exist",
        "This model's maximum context length is 131072 tokens",
        "meta-llama/Llama-3.3-70B-Instruct-Turbo: request 6f1c2b34-5d6e-4f70-8a9b-0c1d2e3f4a5b failed",
        "Unsupported value: 'temperature' does not support 0.2 with this model.",
        "tokens per minute: 40000; basic plan",
        "https://x.test/docs/errors#codes?page=2",
        "api_error: key_not_found, api-version is missing, a bearer token is needed",
    ],
)
def test_what_is_no_key_stays(text: str) -> None:
    assert said({"error": {"message": text}})["message"] == text


def test_long_words_are_cut() -> None:
    words = said({"error": {"message": "why " * 10_000, "type": "t" * 5_000}})
    assert len(words["message"]) == 1000
    assert len(words["type"]) == 200
    assert words["message"].endswith("…")


def test_a_key_across_the_cut_is_removed_first() -> None:
    assert "abcdef" not in said({"error": {"message": "x" * 985 + " sk-proj-abcdefghijklmnop"}})["message"]


def test_values_of_the_configuration_are_removed_from_every_field() -> None:
    words = ProviderError(message="you sent hello-there", type="hello-there", code="x hello-there y", param="n")
    scrubbed = without(words, ["hello-there", "n", ""])
    assert scrubbed == ProviderError(message="you sent [removed]", type="[removed]", code="x [removed] y", param="n")
    assert without(words, []) == words


@pytest.mark.parametrize("piece", ["a", "a*", "<", "sk-", "://", "eyJaaaaaa.", "basic ", "key: ", "0a"])
def test_long_words_cost_no_square(piece: str) -> None:
    started = time.process_time()
    said({"error": {"message": piece * 20_000}})
    assert time.process_time() - started < 5.0


@given(st.text(max_size=200), st.sampled_from(KEYS))
def test_no_surroundings_bring_a_key_back(text: str, key: str) -> None:
    message = said({"error": {"message": f"{text} {key} {text}"}}).get("message", "")
    assert f" {key} " not in message
