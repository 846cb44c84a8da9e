"""What a worker has done is added up, and told once."""

from keepstream.results import Usage
from keepstream_worker.telemetry.figures import Figures, Sums

NONE = [0] * 9


def test_what_comes_is_told_once() -> None:
    figures = Figures()
    with figures.flow("openai", "gpt") as flow:
        assert figures.take() == []
        flow.deltas += 3
        flow.note_first_output(0.15)
        assert figures.take() == [Sums("openai", "gpt", deltas=3, first_outputs=[0, 1, 0, 0, 0, 0, 0, 0, 0])]
        assert figures.take() == []
        flow.deltas += 1  # the attempt goes on
    with figures.flow("openai", "gpt") as another:
        another.deltas += 1
    assert figures.take() == [Sums("openai", "gpt", deltas=2)]


def test_a_target_is_forgotten_when_no_attempt_is_under_way() -> None:
    """Tenants name the models; whoever names another one for each job must not fill the memory."""
    figures = Figures()
    with figures.flow("openai", "gpt") as flow:
        for number in range(1000):
            with figures.flow("openai", f"model-{number}") as brief:
                brief.deltas += 1
        assert sum(sums.deltas for sums in figures.take()) == 1000
        assert len(figures._flows) == 1
        flow.deltas += 1
        assert figures.take() == [Sums("openai", "gpt", deltas=1)]


def test_first_outputs_are_sorted_by_their_time() -> None:
    flow = Figures().flow("openai", "gpt")
    for seconds in (0.0, 0.1, 0.11, 29.9, 30.0, 31.0, 1e9):
        flow.note_first_output(seconds)
    assert flow.first_outputs == [2, 1, 0, 0, 0, 0, 0, 2, 2]


def test_ends_are_summed_by_target_and_how() -> None:
    figures = Figures()
    figures.note_end("openai", "gpt", "finished", "", Usage(prompt_tokens=10, completion_tokens=5))
    figures.note_end("openai", "gpt", "finished", "", Usage(prompt_tokens=1, details={"cost": 0.25}))
    figures.note_end("openai", "gpt", "finished", "", Usage(details={"cost": 0.5}))
    figures.note_end("openai", "gpt", "failed", "timeout", Usage(details={"cost": "free"}))
    assert figures.take() == [
        Sums("openai", "gpt", "finished", attempts=3, prompt_tokens=11, completion_tokens=5, cost=0.75),
        Sums("openai", "gpt", "failed", "timeout", attempts=1),
    ]
    assert figures.take() == []


def test_what_was_told_does_not_change_any_more() -> None:
    figures = Figures()
    figures.flow("openai", "gpt").note_first_output(0.0)
    told = figures.take()
    figures.flow("openai", "gpt").note_first_output(0.0)
    figures.note_end("openai", "gpt", "finished", "", Usage(prompt_tokens=1, completion_tokens=1))
    assert told == [Sums("openai", "gpt", first_outputs=[1, *NONE[1:]])]
