"""Stage `tokenizer`: a discrete VAE on the prepared images, without labels; or the tokenizer of DALL-E, read from its
files; or the description of a pixel target."""

import itertools
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cae.config import Params, TokenizerConfig
from cae.data.loader import Batch
from cae.data.order import steps_in, total_steps
from cae.data.shards import file_sha256
from cae.data.transforms import CropFlip, CropTransform
from cae.errors import Diverged
from cae.normalization import Normalization
from cae.targets.dalle import DalleTarget
from cae.targets.dvae import Dvae, DvaeArchitecture
from cae.targets.files import AnyTarget, save_target
from cae.targets.pixels import PixelArchitecture, PixelTarget
from cae.targets.tokens import perplexity
from cae.train.alarm import Alarm
from cae.train.device import Hardware, set_reproducible
from cae.train.log import Row
from cae.train.loop import Sink, Training
from cae.train.optimizer import adamw
from cae.train.parallel import Ranks
from pipeline import dalle
from pipeline.batches import (
    evaluation_batches,
    first_images,
    second_view_px,
    unit_range,
    view_for_target,
)
from pipeline.live import curves
from pipeline.runs import run_folder
from pipeline.training import stage_training
from pipeline.workspace import Workspace, published

# A code chosen for fewer than this share of its fair part of the patches counts as dead.
DEAD_SHARE = 0.02
RESTART_NOISE = 0.1
# Codes restarted late would not have the time to find patches of their own.
RESTART_UNTIL = 0.6
USAGE_IMAGES, USAGE_BATCH = 1024, 64


def run(workspace: Workspace) -> None:
    """Write `models/tokenizer`; raise Diverged when the codebook's perplexity stays below the stated floor."""
    index, model, config = workspace.index, workspace.params.model, workspace.params.tokenizer
    leads = Ranks.from_environment().leads
    if config.kind != "dvae" and not leads:
        return  # only a training is shared
    origin: dict[str, str] = {}
    target: AnyTarget
    if config.kind == "dvae":
        target, quality, efficiency = _train_dvae(workspace, config)
    elif config.kind == "dalle":
        target, quality, efficiency, origin = _adopt_dalle(workspace)
    else:
        architecture = PixelArchitecture(
            channels=index.channels, patch_size=model.patch_size, grid=model.grid, per_patch=config.normalize_pixels
        )
        target, efficiency = PixelTarget(architecture, index.mean, index.std), {}
        quality = {"skipped": "tokenizer.kind is pixels, so there is nothing to train"}
    if not leads:
        return
    workspace.curves("tokenizer").mkdir(parents=True, exist_ok=True)
    with published(workspace.target.parent) as folder:
        save_target(folder / workspace.target.name, target, origin)
    workspace.write_metrics("tokenizer", quality, efficiency)


def _adopt_dalle(workspace: Workspace) -> tuple[DalleTarget, dict[str, float | str], Row, dict[str, str]]:
    started = time.perf_counter()
    encoder, decoder = dalle.files(workspace)
    hardware = Hardware.choose(workspace.params.runtime)
    set_reproducible(workspace.params.seed)
    target = dalle.read(workspace, encoder, decoder).to(hardware.device)
    quality = evaluate(workspace, target, hardware)
    trials = dalle.trials(workspace, target)
    chosen = dalle.choose(trials)
    dalle.tell(trials, chosen)
    target.architecture = target.architecture.model_copy(update=chosen.precision())
    efficiency = {
        "wall_s": time.perf_counter() - started,
        "images_per_s": chosen.images_per_s,
        **dalle.images_per_s(trials),
    }
    origin = {"encoder_sha256": file_sha256(encoder), "decoder_sha256": file_sha256(decoder)}
    return target, {**quality, **dalle.agreements(trials)}, efficiency, origin


def _train_dvae(workspace: Workspace, config: TokenizerConfig) -> tuple[Dvae, dict[str, float | str], Row]:
    params, index = workspace.params, workspace.index
    hardware = Hardware.choose(params.runtime)
    set_reproducible(params.seed)
    dvae = build(params, Normalization(index.mean, index.std)).to(hardware.device)
    per_epoch = steps_in(1, index.count["train"], config.batch_size)
    folder = run_folder(workspace, "tokenizer", checkpoint_every_steps=per_epoch)
    with curves(folder, workspace.curves("tokenizer"), params.runtime.tensorboard) as sink:
        efficiency = dvae_training(workspace, dvae, hardware, sink).run(folder)
    if not Ranks.from_environment().leads:
        return dvae, {}, efficiency
    quality = evaluate(workspace, dvae.eval(), hardware)
    if float(quality["perplexity"]) < config.min_perplexity:
        raise Diverged(
            f"tokenizer: perplexity {quality['perplexity']:.1f} is below tokenizer.min_perplexity "
            f"{config.min_perplexity} (usage {quality['usage']:.0%} of {config.vocab_size} codes): the codebook has "
            "collapsed. Raise tokenizer.usage_weight or tokenizer.epochs, or lower tokenizer.vocab_size"
        )
    return dvae, quality, efficiency


def dvae_training(workspace: Workspace, dvae: Dvae, hardware: Hardware, sink: Sink | None = None) -> Training:
    """The training of a tokenizer that is on the device."""
    params, config = workspace.params, workspace.params.tokenizer
    num_train = workspace.index.count["train"]
    per_epoch = steps_in(1, num_train, config.batch_size)
    num_steps = total_steps(num_train, config.batch_size, config.epochs)
    usage_images = first_images(workspace, "train", workspace.preprocessing(), USAGE_IMAGES).to(hardware.device)

    def restart(step: int) -> None:
        if step and step % per_epoch == 0 and step < RESTART_UNTIL * num_steps:
            restart_dead_codes(dvae, usage_images, torch.Generator().manual_seed(params.seed + step))

    def step(batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = dvae.training_loss(unit_range(batch["images"]), temperature(config, step, num_steps))
        parts = {
            "reconstruction_loss": loss.reconstruction,
            "unused_nats": loss.unused,
            "perplexity": loss.perplexity,
        }
        return loss.reconstruction + config.usage_weight * loss.unused, parts

    return stage_training(
        workspace,
        config,
        hardware,
        name="tokenizer",
        module=dvae,
        step=step,
        optimizer=adamw(dvae, config),
        transform=CropTransform(CropFlip(params.model.size_px, config)),
        sink=sink,
        alarms=(collapse_alarm(config, round(RESTART_UNTIL * num_steps)),),
        before_step=restart,
    )


def build(params: Params, normalization: Normalization) -> Dvae:
    """An untrained tokenizer for images of as many channels as `normalization` has."""
    config = params.tokenizer
    architecture = DvaeArchitecture(
        channels=len(normalization.mean),
        patch_size=params.model.patch_size,
        grid=params.model.grid,
        vocab_size=config.vocab_size,
        code_width=config.code_width,
        hidden_width=config.hidden_width,
        num_res_blocks=config.num_res_blocks,
    )
    return Dvae(architecture, *normalization)


def collapse_alarm(config: TokenizerConfig, from_step: int) -> Alarm:
    """Sounds when the images of a batch share too few codes, from where dead codes are no longer restarted."""
    return Alarm(
        key="perplexity",
        floor=config.min_perplexity,
        from_step=from_step,
        meaning="the codebook is collapsing, and a tokenizer that ends below tokenizer.min_perplexity fails its stage",
        advice="Raise tokenizer.usage_weight, lower tokenizer.vocab_size or tokenizer.lr",
    )


def temperature(config: TokenizerConfig, step: int, total_steps: int) -> float:
    """Gumbel temperature at a step: a straight line in the logarithm from start to end."""
    share = step / max(1, total_steps - 1)
    return config.temperature_start * (config.temperature_end / config.temperature_start) ** share


@torch.no_grad()
def restart_dead_codes(dvae: Dvae, images: Tensor, generator: torch.Generator) -> int:
    """Make every code that `images` (uint8) hardly use a noisy copy of a much used one; return how many were dead.

    All processes of a training draw the same noise, from `generator` on the CPU.
    """
    chunks = images.split(USAGE_BATCH)
    counts = torch.stack([dvae.count_codes(dvae.encode(unit_range(chunk))) for chunk in chunks]).sum(dim=0)
    dead = (counts < DEAD_SHARE * counts.float().mean()).nonzero().flatten().tolist()
    alive = [code for code in counts.argsort(descending=True).tolist() if code not in set(dead)]
    for dead_code, busy_code in zip(dead, itertools.cycle(alive), strict=False):
        dvae.replace_code(dead_code, busy_code, RESTART_NOISE, generator)
    return len(dead)


@torch.inference_mode()
def evaluate(workspace: Workspace, target: Dvae | DalleTarget, hardware: Hardware) -> dict[str, float | str]:
    """Hard-code reconstruction PSNR, share of the codes in use and perplexity, on the validation images."""
    params = workspace.params
    counts = torch.zeros(target.num_outputs, dtype=torch.int64)
    squared, num_values = 0.0, 0
    view_px = second_view_px(params.model, target.patch_px)
    given = workspace.preprocessing(), params.tokenizer.batch_size, hardware, view_px
    for batch in evaluation_batches(workspace, "val", *given):
        images = unit_range(batch["images"].to(hardware.device))
        tokens = target.encode(view_for_target(batch).to(hardware.device))
        counts += target.count_codes(tokens).cpu()
        squared += float(F.mse_loss(target.decode(tokens).clamp(0, 1), images, reduction="sum"))
        num_values += images.numel()
    return {
        "num_codes": target.num_outputs,
        "usage": float((counts > 0).double().mean()),
        "perplexity": float(perplexity(counts)),
        "psnr_db": -10 * math.log10(max(squared / num_values, 1e-10)),
    }
