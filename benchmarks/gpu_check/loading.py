"""Part 4: whether the loader keeps up with the device."""

from typing import Any

from benchmarks.gpu_check.fast import setting_of
from benchmarks.gpu_check.parts import Check, Context, Result
from benchmarks.training import loading


def loader(context: Context) -> Result:
    """Images a second of all cores from JPEGs, and the share of the time that the ViT-B step waits for them."""
    figures: dict[str, Any] = loading.measure(setting_of(context, "vit_base"))
    parts = figures.pop("one_core_ms_per_image")
    return Result({**figures, **{f"{name}_ms": value for name, value in parts.items()}})


CHECKS = (Check("loader", loader),)
