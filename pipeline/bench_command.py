"""`cae-pipe bench`: our training step beside others, measured on this machine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cae.errors import UserError


class ModelName(StrEnum):
    VIT_SMALL = "vit_small"
    VIT_BASE = "vit_base"
    VIT_LARGE = "vit_large"


class BenchDevice(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class BenchPrecision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


class PartName(StrEnum):
    STEP = "step"
    MEMORY = "memory"
    LOADER = "loader"


def bench(
    model: Annotated[ModelName, typer.Option(help="Size of the encoder.")] = ModelName.VIT_SMALL,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")] = 224,
    patch_size: Annotated[int, typer.Option(min=1, help="Side of a patch in pixels.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 16,
    device: Annotated[BenchDevice, typer.Option(help="auto is the GPU where there is one.")] = BenchDevice.AUTO,
    precision: Annotated[
        BenchPrecision, typer.Option(help="Of all but the plain step, which is always float32.")
    ] = BenchPrecision.FP32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn; medians are shown.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a CPU.", show_default="torch's")] = None,
    compile_step: Annotated[
        bool, typer.Option("--compile", help="Compile our step (minutes before it starts).")
    ] = False,
    only: Annotated[list[PartName] | None, typer.Option(help="Measure this part; may be given again.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure our training step, a plainly written CAE step, and the steps of transformers' BEiT and ViTMAE.

    They take turns on the same images. Also: memory of a step, and the loader alone and feeding our step.

    \b
    Examples:
      cae-pipe bench --model vit_small --image-size 224 --batch-size 16 --device cpu --precision fp32 --out fp32.json
      cae-pipe bench --model vit_base --batch-size 256 --device cuda --precision bf16 --only step --only memory
    """
    # benchmarks/ is a part of the project, not of the installed package.
    try:
        from benchmarks.training import bench as benchmark
        from benchmarks.training.setting import Setting
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "benchmarks":
            raise UserError(
                "cae-pipe bench: the folder benchmarks/ was not found; run it in the project's root"
            ) from None
        raise
    setting = Setting.checked(
        model=model.value,
        image_size=image_size,
        patch_size=patch_size,
        batch_size=batch_size,
        device=device.value,
        precision=precision.value,
        compile=compile_step,
    )
    benchmark.run(setting, rounds, threads, [part.value for part in only or PartName], out)
