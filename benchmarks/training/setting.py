"""What one benchmark measures: sizes, device and precision, the same for every contender."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cae.config import ENCODER_SIZES
from cae.errors import UserError
from cae.train.device import Hardware

VOCAB_SIZE = 8192
PREDICTOR_DEPTH = 4  # of regressor and of decoder
MASKED_SHARE = 0.5  # 98 of 196
BEIT_MASKED_SHARE = 75 / 196
MAE_MASKED_SHARE = 0.75
DROP_PATH, CLIP_GRAD, ALIGNMENT_WEIGHT = 0.1, 3.0, 2.0
LR, WEIGHT_DECAY = 1.5e-3, 0.05
CAE_LAYER_SCALE = 0.1


@dataclass(frozen=True)
class Setting:
    """One benchmark. `precision` holds for all contenders but `plain`, which is always float32."""

    model: str
    image_size: int
    patch_size: int
    batch_size: int
    device: torch.device
    precision: str  # fp32 or bf16
    compile: bool

    @classmethod
    def checked(
        cls,
        *,
        model: str,
        image_size: int,
        patch_size: int,
        batch_size: int,
        device: str,
        precision: str,
        compile: bool,
    ) -> "Setting":
        """Resolve device `auto`; raise UserError for sizes that make no patches and for a device that is not there."""
        if image_size % patch_size:
            nearest = max(1, round(image_size / patch_size)) * patch_size
            raise UserError(
                f"--image-size: {image_size} px are no multiple of --patch-size {patch_size}; the nearest is {nearest}"
            )
        if image_size < 2 * patch_size:
            raise UserError(
                f"--image-size: {image_size} px make one patch of {patch_size} px, of which none could be masked and "
                f"one be visible; give at least {2 * patch_size}"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device: cuda is not available here; expected a CUDA device, or give cpu or auto")
        chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        return cls(model, image_size, patch_size, batch_size, torch.device(chosen), precision, compile)

    @property
    def depth(self) -> int:
        return ENCODER_SIZES[self.model][0]

    @property
    def width(self) -> int:
        return ENCODER_SIZES[self.model][1]

    @property
    def num_heads(self) -> int:
        return ENCODER_SIZES[self.model][2]

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def num_masked(self, share: float) -> int:
        """That share of the patches, at least one masked and one visible."""
        return min(max(1, round(share * self.num_patches)), self.num_patches - 1)

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.device, self.precision == "bf16")

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "model": self.model,
            "image_size_px": self.image_size,
            "patch_size_px": self.patch_size,
            "batch_size": self.batch_size,
            "device": self.device.type,
            "precision": self.precision,
            "compile": self.compile,
            "patches_masked": {
                "cae": f"{self.num_masked(MASKED_SHARE)} of {self.num_patches}",
                "plain": f"{self.num_masked(MASKED_SHARE)} of {self.num_patches}",
                "beit": f"{self.num_masked(BEIT_MASKED_SHARE)} of {self.num_patches}",
                "mae": f"{self.num_masked(MAE_MASKED_SHARE)} of {self.num_patches}",
            },
        }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    named = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **named,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
