"""Part 3: how fast a training step is, beside the device's matrix rate and beside other steps."""

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.machine import copy_rate
from benchmarks.gpu_check.parts import Check, Context, Figures, Result, Skip
from benchmarks.gpu_check.predictions import COMPILED, EAGER, FEW, FREE, PROFILED, TOKENIZERS, category_of, predict
from benchmarks.gpu_check.process import ROOT
from benchmarks.training import contenders
from benchmarks.training.alone import make_room, peak_memory, start_memory
from benchmarks.training.contenders import Batch, Step
from benchmarks.training.contest import TERA, flops, flops_per_image, matmul_tflops
from benchmarks.training.ours import NORMALIZATION, OurStep, compile_all_blocks
from benchmarks.training.setting import MASKED_SHARE, Setting
from benchmarks.training.timing import seconds_per_call, synchronize
from cae.config import load_params
from cae.targets.dalle import DALLE_PATCH_PX, PUBLISHED_SIZES, DalleArchitecture, DalleTarget, DtypeName
from cae.targets.files import AnyTarget
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.train.compile import missing_compiler
from cae.train.device import set_reproducible
from cae.train.parallel import blocks_of
from pipeline import tokenizer

BATCH_SIZE = 256
WARMUP_STEPS, LEAST_STEPS, MOST_STEPS = 3, 3, 60
TIMED_S, TIMED_DRY_S = 3.0, 0.2
PROFILED_STEPS, NUM_KERNELS = 3, 10
SHOWN = 80  # characters of a kernel's name
FEW_IMAGES = 8
COPY_TO_HOST = "Memcpy DtoH"  # as the profiler names it
GIB, GIGA = 2**30, 1e9
COMPILE_LIMIT_S = 90


def setting_of(context: Context, model: str, precision: str = "bf16", compile_blocks: bool = False) -> Setting:
    """The paper's sizes at 224 px; four patches of the smallest model in a dry run."""
    return Setting(
        model=context.size(model, "vit_nano"),
        image_size=context.size(224, 32),
        patch_size=16,
        batch_size=context.size(BATCH_SIZE, 2),
        device=context.device,
        precision=precision,
        compile=compile_blocks,
    )


def eager(model: str, context: Context) -> Result:
    """Our step as it is shipped, with the tokens given: bf16, deterministic where torch can be."""
    setting = setting_of(context, model)
    figures, step = measure(context, setting, _ours)
    if model == "vit_base":
        context.kept["eager"] = step
    return Result(_with_share(context, figures, flops_per_image("cae", setting), setting.precision))


def not_deterministic(context: Context) -> Result:
    """The same with torch's own choice of operations, which may give other bits in every run."""
    figures, _ = measure(context, setting_of(context, "vit_base"), _ours, deterministic=False)
    return Result(figures)


def compiled(context: Context) -> Result:
    """Our step with every block compiled: the time to its first step, and then."""
    if reason := missing_compiler(context.device.type):
        raise Skip(f"nothing can be compiled: {reason}")
    setting = setting_of(context, "vit_base", compile_blocks=True)
    build = partial(_ours, compile_model=_trace_last_block if context.dry else compile_all_blocks)
    figures, context.kept["compiled"] = measure(context, setting, build)
    return Result(_with_share(context, figures, flops_per_image("cae", setting), setting.precision))


def _trace_last_block(model: nn.Module, _device: torch.device) -> None:
    """For a dry run: traced, and not given to a C++ compiler, which takes half a minute."""
    block = blocks_of(model)[-1]
    block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False)


def profiled(context: Context) -> Result:
    """The largest kernels of a step, its time by category, and the share of it in which nothing ran.

    Eager, and compiled where that was done before.
    """
    steps = {name: context.kept.pop(name) for name in ("eager", "compiled") if name in context.kept}
    if "eager" not in steps:
        _, steps["eager"] = measure(context, setting_of(context, "vit_base"), _ours)
    figures: Figures = {}
    for name, step in steps.items():
        busy, kernels = kernels_of(step, context.device)
        figures[f"{name}_share_of_gaps"] = 1 - busy
        figures[f"{name}_kernels"] = [{**row, "kernel": row["kernel"][:SHOWN]} for row in kernels[:NUM_KERNELS]]
        if name == "eager":
            figures["copies_to_host_a_step"] = sum(
                row["calls_a_step"] for row in kernels if COPY_TO_HOST in row["kernel"]
            )
            for row in kernels:
                category = f"ms: {category_of(row['kernel'])}"
                figures[category] = figures.get(category, 0.0) + row["ms_a_step"]
    return Result(figures)


def few_images(context: Context) -> Result:
    """A step so small that the host, which launches its operators one by one, is what it waits for."""
    setting = replace(setting_of(context, "vit_base"), batch_size=FEW_IMAGES)
    return Result(measure(context, setting, _ours)[0])


def predicted(context: Context) -> Result:
    """The predicted cost of a ViT-B step at the rates measured on this device."""
    setting = replace(setting_of(context, "vit_base"), device=torch.device("cpu"))
    rates = {"bf16_tflops": _rate(context, torch.bfloat16), "copy_tb_per_s": copy_rate(context)}
    return Result({**rates, "predictions": [asdict(line) for line in predict(setting, rates)]})


def contender(name: str, context: Context) -> Result:
    """One of the other steps on the same images: bf16, but for the plain one, which is float32."""
    precision = "fp32" if name == "plain" else "bf16"
    setting = setting_of(context, "vit_base", precision)

    def build(setting: Setting) -> Step:
        return contenders.build(name, Batch.draw(setting))

    figures, _ = measure(context, setting, build, deterministic=False)
    return Result(_with_share(context, figures, flops_per_image(name, setting), precision))


def with_target(kind: str, context: Context) -> Result:
    """Our step with a target that is computed: what `pretrain` does with that tokenizer."""
    setting = setting_of(context, "vit_base")

    def build(setting: Setting) -> Step:
        return _ours(setting, _target(kind, context, setting))

    figures, _ = measure(context, setting, build)
    one = replace(setting, precision="fp32", batch_size=1)
    return Result(_with_share(context, figures, flops(build(one)), setting.precision))


def _ours(
    setting: Setting,
    target: AnyTarget | None = None,
    compile_model: Callable[[nn.Module, torch.device], None] = compile_all_blocks,
) -> Step:
    """Our step on images of the loader. The tokenizer reads its own view where that has another size."""
    torch.manual_seed(0)
    batch = Batch.draw(setting)
    visible, masked = batch.masks(MASKED_SHARE)
    fed = {"images": batch.images, "visible": visible, "masked": masked, "labels": batch.tokens[:, 0]}
    if target and target.patch_px != setting.patch_size:
        side = target.patch_px * setting.grid[0]
        fed["target_images"] = batch.images[:, :, :side, :side].contiguous()
    step = OurStep(setting, target or batch.tokens, compile_model)
    return lambda: step(fed)


def _target(kind: str, context: Context, setting: Setting) -> AnyTarget:
    """A target at random, of the sizes that the paper's profiles have; small in a dry run."""
    if kind == "pixels":
        pixels = PixelArchitecture(channels=3, patch_size=setting.patch_size, grid=setting.grid, per_patch=True)
        return PixelTarget(pixels, *NORMALIZATION)
    if kind == "dvae":
        params = load_params(ROOT / "params/imagenet.yaml" if not context.dry else ROOT / "params.yaml")
        model = params.model.model_copy(update={"image_size": setting.image_size, "patch_size": setting.patch_size})
        return tokenizer.build(params.model_copy(update={"model": model}), NORMALIZATION).eval()
    sizes = PUBLISHED_SIZES.model_dump()
    if context.dry:
        sizes |= {"vocab_size": 64, "hidden_width": 8, "num_res_blocks": 1}
    dtype: DtypeName = "bfloat16" if setting.precision == "bf16" else "float32"
    target = DalleTarget(
        DalleArchitecture(
            **sizes, channels=3, patch_size=setting.patch_size, grid=setting.grid, dtype=dtype, channels_last=True
        )
    ).eval()
    assert target.patch_px == DALLE_PATCH_PX
    target.speed_up()
    return target


def measure(
    context: Context, setting: Setting, build: Callable[[Setting], Step], *, deterministic: bool = True
) -> tuple[Figures, Step]:
    """Images a second of a step after its first ones, its peak memory, and the step; at the largest batch that fits."""
    while True:
        _free(context.device)
        try:
            return _measure(context, setting, build, deterministic)
        except torch.OutOfMemoryError:
            if setting.batch_size == 1:
                raise
            setting = replace(setting, batch_size=setting.batch_size // 2)


def _measure(
    context: Context, setting: Setting, build: Callable[[Setting], Step], deterministic: bool
) -> tuple[Figures, Step]:
    if deterministic:
        set_reproducible(0)
    else:
        torch.use_deterministic_algorithms(False)
    device = context.device
    before = start_memory(device)
    step = build(setting)
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    first_s = time.perf_counter() - started
    once_s = seconds_per_call(step, WARMUP_STEPS, device)
    count = math.ceil(context.size(TIMED_S, TIMED_DRY_S) / once_s)
    seconds = seconds_per_call(step, min(MOST_STEPS, max(LEAST_STEPS, count)), device)
    figures: Figures = {
        "images_per_s": setting.batch_size / seconds,
        "step_ms": 1000 * seconds,
        "first_step_s": first_s,
        "batch_size": setting.batch_size,
    }
    if device.type == "cuda":
        figures["peak_memory_gib"] = (peak_memory(device) - before) / GIB
    return figures, step


def _free(device: torch.device) -> None:
    """Release what earlier steps no longer need."""
    gc.collect()
    make_room(device)


def _with_share(context: Context, figures: Figures, flop_per_image: float, precision: str) -> Figures:
    rate = figures["images_per_s"] * flop_per_image / TERA
    return {
        **figures,
        "precision": precision,
        "gflop_per_image": flop_per_image / GIGA,
        "share_of_matrix_rate": rate / _rate(context, torch.bfloat16 if precision == "bf16" else torch.float32),
    }


def _rate(context: Context, dtype: torch.dtype) -> float:
    """TFLOP/s of large products, measured once."""
    rates: dict[torch.dtype, float] = context.kept.setdefault("rates", {})
    if dtype not in rates:
        rates[dtype] = matmul_tflops(context.device, dtype)
    return rates[dtype]


def kernels_of(step: Step, device: torch.device) -> tuple[float, list[Figures]]:
    """Share of the time in which the device was busy, and its kernels, the longest first, in milliseconds a step.

    On a CPU the operators take the kernels' place.
    """
    on_gpu = device.type == "cuda"
    # The host's operators are left out where they can be: taking them down would slow the host.
    events = _profiled(step, device, ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU)
    if on_gpu and not events:
        events = _profiled(step, device, ProfilerActivity.CPU, ProfilerActivity.CUDA)
    if not events:
        raise RuntimeError("the profiler saw no kernels")
    total: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        total[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        calls[event.name] += 1
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    rows = [
        {
            "kernel": name,
            "ms_a_step": microseconds / 1000 / PROFILED_STEPS,
            "share": microseconds / sum(total.values()),
            "calls_a_step": calls[name] / PROFILED_STEPS,
        }
        for name, microseconds in sorted(total.items(), key=lambda item: -item[1])
    ]
    return busy_share(spans), rows


def _profiled(step: Step, device: torch.device, *activities: ProfilerActivity) -> list[Any]:
    synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        synchronize(device)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return [
        event
        for event in profiler.events() or ()
        # Annotations of torch's own span many kernels.
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]


def busy_share(spans: Iterable[tuple[float, float]]) -> float:
    """Share of the time from the first beginning to the last end that at least one span covers."""
    ordered = sorted(spans)
    covered, until = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / max(until - ordered[0][0], 1e-9)


PEERS: dict[str, Any] = {"needs": ("transformers",)}
CHECKS = (
    Check(EAGER, partial(eager, "vit_base")),
    Check(COMPILED, compiled, limit_s=COMPILE_LIMIT_S),
    Check(PROFILED, profiled),
    Check("predictions", predicted),
    Check("plain step, float32", partial(contender, "plain")),
    Check("transformers BEiT-B", partial(contender, "beit"), **PEERS),
    Check("transformers ViTMAE-B", partial(contender, "mae"), **PEERS),
    Check(TOKENIZERS["dvae"], partial(with_target, "dvae")),
    Check("ViT-B, pixels", partial(with_target, "pixels")),
    Check(TOKENIZERS["dalle"], partial(with_target, "dalle")),
    Check("ViT-S, tokens given, eager", partial(eager, "vit_small")),
    Check(FREE, not_deterministic),
    Check(FEW, few_images),
)
