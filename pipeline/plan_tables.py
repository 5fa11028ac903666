"""How plans are shown: tables with a column for each profile, or JSON."""

import json
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from pipeline.costs import count_memory
from pipeline.plan import (
    ASSUMED_UTILIZATION,
    PEAK_TFLOPS,
    TABLE_10_BATCH,
    TABLE_10_GPUS,
    Machine,
    Plan,
    Table10Row,
    as_dict,
    table_10,
)

MEGA, GIGA = 1e6, 1e9
MIB = 2**20

PARAMETERS = {
    "encoder": "encoder",
    "projection": "projection to the predictor's width",
    "regressor": "regressor",
    "decoder": "decoder",
    "head": "head",
    "trained": "all trained",
    "tokenizer": "tokenizer (frozen)",
}
PARTS = {
    "encoder": "encoder on visible + class token",
    "projection": "projection",
    "regressor": "regressor",
    "decoder": "decoder",
    "head": "head",
    "alignment": "alignment on masked + class token",
    "tokenizer": "tokenizer",
}
OTHER_TARGETS = {
    "tokens_given": "step if tokens were given",
    "pixels": "step with RGB pixels",
    "dalle": "step with the DALL-E tokenizer ¹",
}
DALLE_NOTE = "¹ With the sizes of the published tokenizer, one token for 8 px of its smaller view."
BF16_NOTE = (
    "² Autocast as on a CPU: with the casts of the weights, and with the attention weights, which a fused kernel of a "
    "GPU does not keep. No memory has been measured on a GPU."
)


def show(plans: Sequence[Plan], machine: Machine, *, as_json: bool) -> None:
    """Print the plans; the paper's Table 10 beside them where one of them is its model."""
    cae = next((plan for plan in plans if plan.is_table_10), None)
    if as_json:
        document = {"plans": [as_dict(plan) for plan in plans], "devices": machine.devices}
        rows = table_10(cae) if cae else []
        document["table_10"] = [
            {**row._asdict(), "images_per_s": row.images_per_s, "utilization": row.utilization} for row in rows
        ]
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    console = Console()
    for table in (_parameter_table, _arithmetic_table, _memory_table):
        console.print(table(plans))
    console.print(_time_table(plans, machine))
    _say(console, _notes(plans, machine))
    if cae:
        console.print(_paper_table(table_10(cae), machine.utilization or ASSUMED_UTILIZATION))
        _say(console, _differences(cae))


def _say(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _table(title: str, plans: Sequence[Plan]) -> Table:
    table = Table("", *(plan.name for plan in plans), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _parameter_table(plans: Sequence[Plan]) -> Table:
    table = _table("Parameters in millions", plans)
    models = [plan.params.model for plan in plans]
    table.add_row("model", *(model.name for model in models))
    table.add_row("image, px", *("{}×{}×{}".format(*plan.params.model.size_px, plan.channels) for plan in plans))
    masked = (f"{plan.params.num_masked} of {plan.params.model.num_patches}" for plan in plans)
    table.add_row("patches masked", *masked, end_section=True)
    for name, label in PARAMETERS.items():
        counts = [plan.parameters[name] / MEGA for plan in plans]
        if any(counts):
            table.add_row(label, *map(_figure, counts))
    return table


def _arithmetic_table(plans: Sequence[Plan]) -> Table:
    table = _table("GMAC for one image", plans)
    for parts in zip(*(plan.arithmetic.parts for plan in plans), strict=True):
        if any(part.macs for part in parts):
            table.add_row(f"{PARTS[parts[0].name]}, ×{parts[0].passes}", *(_figure(part.macs / GIGA) for part in parts))
    steps = (_figure(plan.arithmetic.step / GIGA) for plan in plans)
    table.add_row("step: the sum of part × passes", *steps, end_section=True)
    for name, label in OTHER_TARGETS.items():
        others = [plan.arithmetic.other_targets.get(name, 0) / GIGA for plan in plans]
        if any(others):
            table.add_row(label, *map(_figure, others))
    table.add_row(
        "encoder on all patches (inference)", *(_figure(p.arithmetic.encoder_all_patches / GIGA) for p in plans)
    )
    return table


def _memory_table(plans: Sequence[Plan]) -> Table:
    table = _table("Memory of one device in MiB", plans)
    table.add_row("images of a step on it", *(f"{plan.batch_per_device:,}" for plan in plans), end_section=True)
    memories = [plan.memory for plan in plans]
    rows: dict[str, Iterable[int]] = {
        "weights": (memory.weights for memory in memories),
        "gradients": (memory.gradients for memory in memories),
        "moments of AdamW": (memory.moments for memory in memories),
        "kept for backward, fp32": (memory.activations["fp32"] for memory in memories),
        "kept for backward, bf16 ²": (memory.activations["bf16"] for memory in memories),
        "or, before that, tokenizer at work": (memory.tokenizer for memory in memories),
        "all, fp32": (memory.total("fp32") for memory in memories),
        "all, bf16": (memory.total("bf16") for memory in memories),
        "a checkpoint on disk (two are kept)": (memory.checkpoint for memory in memories),
    }
    for label, values in rows.items():
        table.add_row(label, *(f"{value / MIB:,.0f}" for value in values), end_section=label.startswith("or,"))
    return table


def _time_table(plans: Sequence[Plan], machine: Machine) -> Table:
    table = _table("Pretraining", plans)
    table.add_row("epochs", *(f"{plan.params.pretrain.epochs:,}" for plan in plans))
    table.add_row("training images", *(f"{plan.num_images:,}" if plan.num_images else "unknown" for plan in plans))
    table.add_row("images of a step", *(f"{plan.batch_size:,}" for plan in plans))
    table.add_row("devices", *(str(machine.devices) for _ in plans))
    table.add_row("images/s of a device", *(f"{plan.speed.images_per_s:,.0f}" if plan.speed else "-" for plan in plans))
    table.add_row("hours", *("-" if plan.hours is None else f"{plan.hours:,.1f}" for plan in plans))
    return table


def _notes(plans: Sequence[Plan], machine: Machine) -> list[str]:
    notes = [
        "Counted: matrix products and convolutions, attention's too. A MAC is 2 FLOP; ×3 is forward and backward.",
        BF16_NOTE,
    ]
    if any("dalle" in plan.arithmetic.other_targets for plan in plans):
        notes.insert(1, DALLE_NOTE)
    speed = plans[0].speed
    if speed is None:
        notes.append("For hours: --device NAME or --device-tflops X, or --images-per-s X as measured.")
    elif speed.origin == "assumed":
        notes.append(
            f"Assumed, not measured: {speed.utilization:.0%} of the bf16 peak of {machine.tflops:g} TFLOP/s, and data "
            "that keep up. (The tokenizer runs in float32, whose peak is lower.)"
        )
    elif speed.origin == "measured":
        notes.append("images/s: measured by the last `cae-pipe pretrain` here (metrics/efficiency/pretrain.json).")
    elif speed.utilization is not None:
        notes.append(f"As given: {speed.utilization:.1%} of the bf16 peak of {machine.tflops:g} TFLOP/s.")
    if machine.devices > 1:
        notes.append(f"Assumed: {machine.devices} devices are {machine.devices} times as fast as one.")
    if any(plan.num_images is None for plan in plans):
        notes.append("How many images the source has is unknown before `prepare`; --images N tells it.")
    return notes


def _paper_table(rows: Sequence[Table10Row], utilization: float) -> Table:
    title = "The paper's Table 10: ViT-B, 1600 epochs, batch 2048, 32 A100"
    headers = ("", "GMAC a step", "hours", "images/s a GPU", "of the peak", f"hours at {utilization:.0%}", "MiB a GPU")
    table = Table(*headers, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.method,
            _figure(row.step_macs / GIGA),
            f"{row.hours:g}",
            f"{row.images_per_s:.0f}",
            f"{row.utilization:.1%}",
            f"{row.hours_at(utilization):.0f}",
            f"{row.memory_mib:,}",
        )
    return table


def _differences(cae: Plan) -> list[str]:
    counted = count_memory(cae.params, cae.channels, TABLE_10_BATCH // TABLE_10_GPUS).total("bf16")
    return [
        f"Hours and MiB are the paper's, the rest follows from them. Peak: {PEAK_TFLOPS['a100']:g} TFLOP/s. BEiT and "
        "CAE with DALL-E as the tokenizer; the paper does not say which one this table had.",
        "A prediction from arithmetic is shorter. A step of MAE has little more than a third of CAE's arithmetic, and "
        "took four fifths of the time: something else set the pace, such as reading and augmenting images, waiting "
        "for the device and unfused attention. To take that in, give a --utilization or --images-per-s as measured.",
        f"Memory: {counted / MIB:,.0f} MiB are counted here for {TABLE_10_BATCH // TABLE_10_GPUS} images a GPU, bf16. "
        "The paper's figure also holds what is not counted: the official code's second copy of the encoder, buffers "
        "for the exchange of gradients, working space of kernels.",
    ]


def _figure(value: float) -> str:
    """Two decimals, three digits below 1, a dash for what is not there."""
    if not value:
        return "-"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
