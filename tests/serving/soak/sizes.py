"""How large the hard tests are: in full with `make soak` (it sets CAE_SOAK), else a sample of each for `make test`."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    rounds_of_64: int
    overload_s: float
    overload_limit: int
    openapi_cases: int
    damaged_cases: int
    chaos_requests: int


FULL = bool(os.environ.get("CAE_SOAK"))
SIZES = (
    Sizes(
        rounds_of_64=20,
        overload_s=60,
        overload_limit=128,
        openapi_cases=300,
        damaged_cases=5000,
        chaos_requests=10_000,
    )
    if FULL
    else Sizes(
        rounds_of_64=1,
        overload_s=4,
        overload_limit=32,
        openapi_cases=6,
        damaged_cases=150,
        chaos_requests=300,
    )
)
