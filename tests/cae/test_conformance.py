"""Our forward pass equals the official code's, within 1e-5 (numbers: tests/data/cae_forward.json)."""

import logging

import pytest
import torch

from tests.official import CASES, TOLERANCE, differences

logger = logging.getLogger(__name__)


@pytest.mark.parametrize("name", CASES)
def test_forward_agrees_with_the_official_code(name: str) -> None:
    for key, difference in differences(CASES[name], torch.device("cpu")).items():
        logger.info("%s %s: %.1e", name, key, difference)
        assert difference < TOLERANCE, key
