"""Parameters that fit a source: from findings to keys of params.yaml, each with its reason. Nothing is read here."""

import math
from typing import Any, NamedTuple

from cae.errors import UserError
from pipeline.inspection import Findings

MIN_SIDE_PX, LARGE_PX = 8, 128
MAX_BROKEN = 0.5
CPU_MAX_PX, GPU_MAX_PX = 64, 224
# Patches of the training data for one code, as on the digits, where 256 codes fill well.
PATCHES_PER_CODE = 768
MIN_VOCAB, CPU_MAX_VOCAB, GPU_MAX_VOCAB = 32, 1024, 8192
# With a perplexity below this share of the codes most of them are dead.
MIN_PERPLEXITY_SHARE = 1 / 8
PRETRAIN_STEPS, TOKENIZER_STEPS, FINETUNE_STEPS = 3000, 800, 400
MAX_EPOCHS = {"tokenizer": 200, "pretrain": 800, "finetune": 100}
CPU_PRETRAIN_S, GPU_PRETRAIN_S = 3600.0, 12 * 3600.0
CROPPED = ("tokenizer", "pretrain", "finetune", "probe.linear", "probe.attentive")
# Batches of the shipped parameters, and those a GPU wants.
BATCHES = {"tokenizer": 64, "pretrain": 64, "finetune": 128, "probe.linear": 512, "probe.attentive": 256}
GPU_BATCHES = BATCHES | {"tokenizer": 128, "pretrain": 256}


class Choice(NamedTuple):
    """A value for a key of params.yaml, and why."""

    key: str
    value: Any
    reason: str


def choose(findings: Findings, source: str, *, gpu: bool, num_cores: int) -> list[Choice]:
    """Everything but how long to train. Raises UserError where there is too little to train on."""
    if findings.num_train < 2 or findings.num_val < 1:
        raise UserError(
            f"--images: {source} has {findings.num_train} usable training and {findings.num_val} validation images; "
            "expected at least 2 and 1. `cae-pipe init` names the broken files above"
        )
    image_size, patch_size = picture_sizes(findings.short_side_px, gpu)
    photographs = not findings.grey and findings.short_side_px > 1.25 * image_size
    crop = 0.3 if photographs else 0.6
    side = f"the median short side is {findings.short_side_px} px"
    small = findings.short_side_px <= CPU_MAX_PX
    batches = batch_sizes(findings.num_train, gpu)
    stored_px = max(64, 32 * math.ceil(image_size / math.sqrt(crop) / 32))
    return [
        Choice("prepare.source", source, "the images that were looked at"),
        *_channels(findings.channels),
        Choice("prepare.short_side_px", stored_px, f"a crop of {crop:.0%} of the area still has {image_size} px"),
        Choice("runtime.num_workers", 0 if small else min(num_cores, 8), f"{side}; {num_cores} cores"),
        Choice("model.image_size", image_size, f"{side}, {'a GPU' if gpu else 'no GPU'}"),
        Choice("model.patch_size", patch_size, f"{(image_size // patch_size) ** 2} patches an image"),
        Choice("model.name", model_name(findings.num_train, image_size, gpu), f"{findings.num_train} training images"),
        Choice("model.eval_crop", 0.875 if photographs else 1.0, "larger than the input" if photographs else side),
        *_vocabulary(findings.num_train * (image_size // patch_size) ** 2, gpu),
        *(Choice(f"{s}.crop_scale", [crop, 1.0], "photographs" if photographs else "small or grey") for s in CROPPED),
        *(
            Choice(
                f"{section}.flip", 0.0 if findings.grey else 0.5, "grey: may be text" if findings.grey else "not grey"
            )
            for section in CROPPED
        ),
        *(
            Choice(f"{section}.batch_size", size, f"at most a quarter of {findings.num_train} training images")
            for section, size in batches.items()
        ),
        Choice("probe.linear.lr", 0.1 * batches["probe.linear"] / 256, "0.1 · batch / 256"),
        Choice("probe.knn.k", max(1, min(20, findings.num_train // 10)), "a tenth of the training images, at most 20"),
    ]


def tolerance(findings: Findings, shipped: float) -> list[Choice]:
    """A higher `prepare.max_reject_fraction` where the shipped one would stop at what was seen and named.

    With more than half of the files broken it is left, for then the source itself is suspect.
    """
    broken = findings.broken_fraction
    if not shipped < broken <= MAX_BROKEN:
        return []
    # Half as much again, for in a sample there may be a few less than in all.
    raised = min(math.ceil(150 * broken) / 100, 1.0)
    reason = f"{len(findings.broken)} of {findings.num_sampled} are broken and left out"
    return [Choice("prepare.max_reject_fraction", raised, reason)]


def lengths(
    num_train: int, batch_sizes: dict[str, int], pretrain_step_s: float, shipped_epochs: dict[str, int], *, gpu: bool
) -> list[Choice]:
    """Epochs and warm-ups. `pretrain_step_s` is the time of one step; it shortens what would take too long."""
    budget_s = GPU_PRETRAIN_S if gpu else CPU_PRETRAIN_S
    affordable = max(1, int(budget_s / max(pretrain_step_s, 1e-6)))
    wanted = {"tokenizer": TOKENIZER_STEPS, "pretrain": PRETRAIN_STEPS, "finetune": FINETUNE_STEPS}
    choices = []
    for section, steps in wanted.items():
        per_epoch = round(num_train / batch_sizes[section])
        reason = f"at least {steps} steps, {per_epoch} an epoch"
        epochs = min(max(shipped_epochs[section], math.ceil(steps / per_epoch)), MAX_EPOCHS[section])
        if section == "pretrain" and epochs * per_epoch > affordable:
            epochs, reason = max(2, affordable // per_epoch), f"what fits into {budget_s / 3600:.0f} h"
        warmup = 1 if epochs < 20 else epochs // 10
        choices += [
            Choice(f"{section}.epochs", epochs, reason),
            Choice(f"{section}.warmup_epochs", warmup if epochs > 1 else 0.5, "a tenth"),
        ]
    return choices


def picture_sizes(short_side_px: int, gpu: bool) -> tuple[int, int]:
    """Sides in px of the model's input and of its patches, for images of this median short side."""
    most = GPU_MAX_PX if gpu else CPU_MAX_PX
    side = min(max(short_side_px, MIN_SIDE_PX), most)
    patch = next(size for size, above in ((16, LARGE_PX), (8, 48), (4, 20), (2, 0)) if side >= above)
    return max(side // patch, 4) * patch, patch


def model_name(num_train: int, image_size: int, gpu: bool) -> str:
    """An encoder that the data can fill and the machine can train."""
    if not gpu:
        return "vit_micro" if image_size >= 48 and num_train >= 5000 else "vit_nano"
    sizes = ((1_000_000, "vit_base"), (100_000, "vit_small"), (10_000, "vit_tiny"))
    return next((name for least, name in sizes if num_train >= least), "vit_micro")


def batch_sizes(num_train: int, gpu: bool) -> dict[str, int]:
    """The usual batch of every section, or the largest power of two that leaves four steps in an epoch; never 1."""
    most = max(2, 2 ** int(math.log2(max(2, num_train / 4))))
    return {section: min(size, most) for section, size in (GPU_BATCHES if gpu else BATCHES).items()}


def _channels(number: int) -> list[Choice]:
    # Grey and colour are left to the parameters: both are read either way.
    return [] if number in (1, 3) else [Choice("prepare.channels", number, "as most of the images have")]


def _vocabulary(num_patches: int, gpu: bool) -> list[Choice]:
    fitting = 2 ** round(math.log2(max(1, num_patches / PATCHES_PER_CODE)))
    vocab = min(max(fitting, MIN_VOCAB), GPU_MAX_VOCAB if gpu else CPU_MAX_VOCAB)
    return [
        Choice("tokenizer.vocab_size", vocab, f"{num_patches} training patches"),
        Choice("tokenizer.min_perplexity", max(2, round(vocab * MIN_PERPLEXITY_SHARE)), "an eighth of the codes"),
    ]
