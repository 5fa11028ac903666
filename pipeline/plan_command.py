"""`cae-pipe plan`: what pretraining will cost, before anything runs."""

from enum import StrEnum
from typing import Annotated

import typer


class PeakName(StrEnum):
    """Devices whose peak is known; pipeline/plan.py has the figures."""

    A100 = "a100"
    H100_PCIE = "h100-pcie"
    H100_SXM = "h100-sxm"
    H200 = "h200"


def plan(
    profile: Annotated[
        list[str] | None,
        typer.Option(help="One of `cae-pipe profile list`; more than one side by side.", show_default="params.yaml"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a step, over all devices.", show_default="the profile's")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many devices share a step.")] = 1,
    device: Annotated[PeakName | None, typer.Option(help="Which device, for its dense bf16 peak.")] = None,
    device_tflops: Annotated[float | None, typer.Option(help="Or its peak in TFLOP/s, dense.")] = None,
    utilization: Annotated[
        float | None,
        typer.Option(help="Share of the peak that a run reaches, 0 to 1.", show_default="0.3, an assumption"),
    ] = None,
    images_per_s: Annotated[
        float | None, typer.Option(help="Instead of a peak: images a second of one device, measured.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training images.", show_default="as prepared, else what the source has")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the tables.")] = False,
) -> None:
    """Parameters, arithmetic, memory and hours of a pretraining, beside what the paper needed.

    Everything is counted over the modules themselves, and nothing is trained.

    \b
    Examples:
      cae-pipe plan
      cae-pipe plan --profile vit-s-1600 --profile vit-b-1600 --profile vit-l-1600
      cae-pipe plan --profile vit-b-300 --device a100 --devices 8 --utilization 0.25
      cae-pipe plan --profile vit-b-300 --images-per-s 700 --json
    """
    from pipeline import plan as planning
    from pipeline import plan_tables
    from pipeline.workspace import Workspace

    machine = planning.Machine.parse(
        devices=devices,
        device=device.value if device else None,
        device_tflops=device_tflops,
        utilization=utilization,
        images_per_s=images_per_s,
    )
    plans = planning.make(Workspace.here(), profile or [], machine, batch_size, images)
    plan_tables.show(plans, machine, as_json=as_json)
