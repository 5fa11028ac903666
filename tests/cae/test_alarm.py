"""An alarm sounds once when a figure falls through its floor, and says when it is well again."""

import logging

import pytest

from cae.train.alarm import Alarm, Watch

ALARM = Alarm("variance", 0.02, from_step=10, meaning="the patches look alike", advice="Lower the rate")


def sounded(caplog: pytest.LogCaptureFixture, values: list[tuple[int, float]]) -> list[str]:
    watch = Watch("pretrain", (ALARM,))
    with caplog.at_level(logging.WARNING):
        for step, value in values:
            watch.check(step, {"variance": value, "loss": 1.0})
    return [record.getMessage() for record in caplog.records]


def test_a_fall_sounds_once_with_the_figure_the_meaning_and_the_advice(caplog: pytest.LogCaptureFixture) -> None:
    messages = sounded(caplog, [(10, 0.5), (20, 0.01), (30, 0.005)])
    assert len(messages) == 1
    for part in ("step 20", "variance is 0.01", "below 0.02", "the patches look alike", "Lower the rate"):
        assert part in messages[0]


def test_nothing_sounds_before_the_step_it_starts_at(caplog: pytest.LogCaptureFixture) -> None:
    assert sounded(caplog, [(5, 0.001), (10, 0.5)]) == []


def test_it_says_when_the_figure_is_well_again_and_sounds_anew(caplog: pytest.LogCaptureFixture) -> None:
    messages = sounded(caplog, [(10, 0.01), (20, 0.3), (30, 0.01)])
    assert len(messages) == 3
    assert "0.3 again after 20 steps" in messages[1]
