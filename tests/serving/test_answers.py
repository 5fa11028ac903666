"""Choosing the form of an answer."""

from __future__ import annotations

import pytest

from serving.answers import negotiate
from serving.errors import ApiError

OFFERED = ["image/png", "application/json", "application/x-npy"]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "image/png"),
        ("", "image/png"),
        ("*/*", "image/png"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON; charset=utf-8", "application/json"),
        ("application/*", "application/json"),
        ("application/x-npy, application/json;q=0.5", "application/x-npy"),
        ("application/json;q=0.5, application/x-npy;q=0.6, image/png;q=0.1", "application/x-npy"),
        ("*/*;q=0.1, application/json", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("application/*;q=0.2, application/json;q=0, image/*;q=0.1", "application/x-npy"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "image/png"),
        ("application/json;q=high, application/x-npy;q=0.1", "application/x-npy"),
        ("nonsense, application/json", "application/json"),
    ],
)
def test_the_form_the_caller_likes_best_is_chosen(accept: str | None, chosen: str) -> None:
    assert negotiate(accept, OFFERED, "") == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "*/*;q=0", "image/png;q=0", "nonsense", "video/*"])
def test_what_cannot_be_answered_lists_what_can(accept: str) -> None:
    with pytest.raises(ApiError) as caught:
        negotiate(accept, OFFERED, "a hint")
    assert caught.value.status == 406
    assert caught.value.detail.hint == "a hint"
    assert all(offered in caught.value.detail.message for offered in OFFERED)
