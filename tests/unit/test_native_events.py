"""Events as server-sent ones: one frame for all who follow, lines as the format wants them."""

from keepstream.events import RawEvent
from keepstream_gateway.native.events import frame


def test_an_event_is_framed_once_for_all_who_follow() -> None:
    event = RawEvent("1-2", "delta", b'{"content":"a"}')
    assert frame(event) == b'id: 1-2\ndata: {"content":"a"}\n\n'
    assert frame(RawEvent(*event)) is frame(event)


def test_the_frame_of_a_large_event_is_not_kept() -> None:
    event = RawEvent("1-3", "snapshot", b"x" * 100_000)
    assert frame(event) == frame(event)
    assert frame(event) is not frame(event)


def test_each_line_of_an_event_is_a_line_of_data() -> None:
    assert frame(RawEvent("1-4", "delta", b'{\n"content":\r\n"a"}')) == (
        b'id: 1-4\ndata: {\ndata: "content":\ndata: "a"}\n\n'
    )
