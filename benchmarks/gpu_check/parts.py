"""The parts of the check, in the order in which they run, and what one check of a part is and says."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

TOTAL_S = 480.0

Status = Literal["ok", "missed", "failed", "skipped", "out of time", "not reached"]
Figures = dict[str, Any]
"""Names with their unit, to numbers, words, or lists of rows; all of it can be written as JSON."""


@dataclass(frozen=True)
class Part:
    """One process of the check: the module of its checks, the seconds that it may take, the packages that it needs."""

    name: str
    limit_s: float | None  # None: the rest of TOTAL_S
    needs: tuple[str, ...]
    is_small: bool = False  # its tensors are, so one thread is enough
    package: str = "benchmarks.gpu_check"

    @property
    def module(self) -> str:
        """The module that defines its CHECKS."""
        return f"{self.package}.{self.name}"


TRAINING = ("torch", "timm", "numpy", "jaxtyping", "pydantic", "ruamel.yaml", "safetensors", "tqdm", "filelock", "PIL")
STAGES = (*TRAINING, "sklearn", "pyarrow", "scipy", "fsspec")
EXPORT = (*STAGES, "onnx", "onnxscript", "onnxruntime", "jinja2", "matplotlib")
SERVER = ("fastapi", "uvicorn", "httptools", "orjson", "prometheus_client", "pydantic_settings", "python_multipart")

PARTS = (
    Part("machine", 15, ("torch", "numpy", "pydantic")),
    Part("right", 90, (*EXPORT, "mlxtend"), is_small=True),
    Part("fast", 170, TRAINING),
    Part("loading", 30, STAGES),
    Part("serve", 75, (*EXPORT, *SERVER, "pythonjsonlogger", "psutil")),
    Part("learn", None, EXPORT),
)


@dataclass(frozen=True)
class Context:
    """Input of a check. `dry` asks for tiny sizes; the part's process is killed at `ends_at`."""

    device_type: str
    dry: bool
    folder: Path  # of this part alone, removed at the end
    data: Path | None
    ends_at: float  # as time.time gives it
    kept: dict[str, Any] = field(default_factory=dict)  # by one check for a later one of the same process

    @property
    def device(self) -> "torch.device":
        import torch  # takes seconds, which a process that ends in its first check need not wait for

        return torch.device(self.device_type)

    @property
    def left_s(self) -> float:
        return self.ends_at - time.time()

    def size(self, real: Any, tiny: Any) -> Any:
        """`real`, or `tiny` in a dry run."""
        return tiny if self.dry else real


@dataclass(frozen=True)
class Result:
    """Figures of a check, and a sentence for each requirement that it missed."""

    figures: Figures
    missed: list[str] = field(default_factory=list)


class Skip(Exception):  # noqa: N818 (no error)
    """A check cannot run here, and nothing is wrong; its message says why."""


@dataclass(frozen=True)
class Check:
    """One question of a part, answered on its own."""

    name: str
    run: Callable[[Context], Result]
    limit_s: float | None = None  # of its own, below the part's
    needs: tuple[str, ...] = ()  # packages, besides the part's


@dataclass(frozen=True)
class Outcome:
    """How a check ended, or a whole part where `check` is empty."""

    part: str
    check: str
    status: Status
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    said: str = ""  # why it is not ok
    place: str = ""  # file:line of the project in which it failed

    @property
    def is_good(self) -> bool:
        return self.status in ("ok", "skipped")


def relative_difference(value: float, expected: float) -> float:
    """|value - expected| as a share of the expected value."""
    return abs(value - expected) / max(abs(expected), 1e-12)


def missed_above(limit: float, values: Mapping[str, float], what: str) -> list[str]:
    """Words for each value that is above `limit`, or not a number."""
    return [f"{name}: {what} {value:.2e}, at most {limit:g}" for name, value in values.items() if not value <= limit]
