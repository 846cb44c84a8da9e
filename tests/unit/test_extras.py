"""The extras of an answer: pieces add up, and what is too large for events is told by its size."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstream.extras import Extras, abridged, abridged_fields, joined_base64, joined_pieces, merged_extra, omissions


def added(*pieces: dict[str, Any]) -> dict[str, Any] | None:
    extras = Extras()
    for piece in pieces:
        for name, value in piece.items():
            extras.add(name, value)
    value = extras.value()
    assert Extras(value).value() == value  # a snapshot can be gone on from
    return value


def blocks(*pieces: dict[str, Any], name: str = "reasoning_details") -> list[Any]:
    value = added(*({name: [piece]} for piece in pieces))
    assert value is not None
    return list(value[name])


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "reasoning.text", "text": words, **fields}


def thinking(words: str, signature: str = "") -> dict[str, Any]:
    return {"type": "thinking", "thinking": words, "signature": signature}


def test_texts_and_lists_are_appended_objects_joined_and_the_rest_replaced() -> None:
    assert added(
        {"plan": "a", "seen": [1], "deep": {"words": "x", "id": "i1", "count": 1, "gone": None}},
        {"plan": "b", "seen": [2], "deep": {"words": "y", "id": "i2", "count": 2}},
    ) == {"plan": "ab", "seen": [1, 2], "deep": {"words": "xy", "id": "i2", "count": 2, "gone": None}}
    assert added() is None


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("plan", "a", "b"),
        ("id", "i1", "i2"),
        ("deep", {"words": "x", "gone": None}, {"words": "y", "more": [1]}),
        ("seen", [1], [2]),
        ("reasoning_details", [text("a", index=0)], [text("b", index=0), text("c", index=1)]),
        ("audio", {"data": "AAA="}, {"data": "AAA=", "transcript": "la"}),
        ("seen", {"omitted": "seen", "bytes": 100}, [2]),
    ],
)
def test_two_pieces_made_one_add_up_to_the_same(name: str, first: Any, second: Any) -> None:
    assert added({name: joined_pieces(first, second, name)}) == added({name: first}, {name: second})
    assert joined_pieces(None, first, name) == first


def test_pieces_of_one_index_are_one_block() -> None:
    assert blocks(
        text("Let ", index=0, id="a", format="f", signature=None),
        text("me", index=0, id=None, format=None),
        {"type": "reasoning.summary", "summary": "In ", "index": 1},
        {"type": "reasoning.text", "index": 0, "signature": "sig"},
        {"type": "reasoning.summary", "summary": "short", "index": 1},
    ) == [
        text("Let me", index=0, id="a", format="f", signature="sig"),
        {"type": "reasoning.summary", "summary": "In short", "index": 1},
    ]


def test_what_is_encrypted_comes_whole_and_repeated_it_counts_once() -> None:
    first, second = ({"type": "reasoning.encrypted", "data": data, "index": 0} for data in ("AA", "BB"))
    assert blocks(first, first, second) == [first, second]


def test_without_an_index_a_signature_ends_a_block() -> None:
    assert blocks(
        thinking("Let "),
        thinking("me"),
        thinking("", "S1"),
        {"type": "redacted_thinking", "data": "x"},
        thinking("Then"),
        thinking("", "S2"),
        thinking("Last", "S3"),
        name="thinking_blocks",
    ) == [
        thinking("Let me", "S1"),
        {"type": "redacted_thinking", "data": "x"},
        thinking("Then", "S2"),
        thinking("Last", "S3"),
    ]


def test_without_an_index_another_id_begins_a_block() -> None:
    assert blocks(text("a", id="1"), text("b"), text("c", id="2")) == [text("ab", id="1"), text("c", id="2")]


def test_parts_within_a_block_are_blocks_themselves() -> None:
    def part(words: str, **fields: Any) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [{"type": "summary_text", "text": words, **fields}]}

    assert blocks(part("a"), part("b"), part("", signature="s"), name="reasoning_parts") == [part("ab", signature="s")]


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6))
def test_audio_that_was_encoded_piece_by_piece_is_one_sound(pieces: list[bytes]) -> None:
    encoded = "".join(base64.b64encode(piece).decode() for piece in pieces)
    assert base64.b64decode(joined_base64(encoded), validate=True) == b"".join(pieces)


def test_base64_is_decoded_only_where_needed() -> None:
    whole = base64.b64encode(bytes(range(100))).decode()
    assert joined_base64(whole) is whole
    assert joined_base64("no=base64=") == "no=base64="
    assert added({"audio": {"data": "QQ==", "id": "au"}}, {"audio": {"data": "QkM="}}) == {
        "audio": {"data": "QUJD", "id": "au"}
    }


def size(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")))


def test_what_is_too_large_for_events_is_told_by_its_size() -> None:
    image = {"type": "image_url", "image_url": {"url": "x" * 200}}
    item = {"type": "image_generation_call", "result": "x" * 200}
    extra = {
        "images": [image, 1],
        "responses_output": [{"type": "message"}, item],
        "audio": {"id": "au", "data": "x" * 101},
        "annotations": [{"n": n} for n in range(40)],
        "plan": "short",
    }
    short = abridged_fields(extra, 100)
    assert short == {
        "images": [{"omitted": "image", "bytes": size(image)}, 1],
        "responses_output": [{"type": "message"}, {"omitted": "image", "bytes": size(item)}],
        "audio": {"id": "au", "data": {"omitted": "audio", "bytes": 101}},
        "annotations": {"omitted": "annotations", "bytes": size(extra["annotations"])},
        "plan": "short",
    }
    assert omissions(short) == {
        "images": size(image),
        "responses_output": size(item),
        "audio": 101,
        "annotations": size(extra["annotations"]),
    }
    assert omissions(extra) == {}
    assert abridged(image, 1000) is image
    assert abridged_fields(None) is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_text_of_which_a_piece_was_omitted_is_omitted(order: int) -> None:
    pieces: list[dict[str, Any]] = [{"audio": {"data": "QUJD"}}, {"audio": {"data": {"omitted": "audio", "bytes": 8}}}]
    assert added(*pieces[::order], pieces[0]) == {"audio": {"data": {"omitted": "audio", "bytes": 16}}}


def test_the_extras_of_a_call_come_whole() -> None:
    first = {"extra_content": {"google": {"thought_signature": "A"}}, "n": [1]}
    assert merged_extra(None, first) == first
    assert merged_extra(first, {"extra_content": {"google": {"thought_signature": "B"}}, "n": [2], "x": None}) == {
        "extra_content": {"google": {"thought_signature": "B"}},
        "n": [2],
        "x": None,
    }
