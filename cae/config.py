"""Typed sections of params.yaml: one class for each section, every combination checked before any work begins."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cae.architecture import Architecture, check_heads
from cae.errors import UserError
from cae.section import Count, CountOrZero, Fraction, NonNegative, Positive, PositiveFraction, Section

# depth, width, heads; timm's sizes from vit_tiny on. The smaller two are for images of 28 to 64 px on a laptop.
ENCODER_SIZES = {
    "vit_nano": (6, 128, 4),
    "vit_micro": (8, 160, 4),
    "vit_tiny": (12, 192, 3),
    "vit_small": (12, 384, 6),
    "vit_base": (12, 768, 12),
    "vit_large": (24, 1024, 16),
}

# One token of the DALL-E tokenizer stands for so many pixels, on either side, of the view that it reads.
DALLE_PATCH_PX = 8


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    num_workers: CountOrZero
    compile: bool
    num_processes: Count | Literal["auto"]
    parallel: Literal["ddp", "fsdp"]
    accumulate_steps: Count
    activation_checkpointing: bool
    keep_checkpoints: Count
    keep_every_steps: Count | None
    max_skipped_steps: CountOrZero
    tensorboard: bool


class PrepareConfig(Section):
    source: str
    channels: Literal["auto", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    short_side_px: Count
    max_reject_fraction: Fraction
    shard_mb: Positive
    shards_at: str | None


class ModelConfig(Section):
    name: Literal["vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large"]
    depth: Count | None
    width: Count | None
    num_heads: Count | None
    image_size: Count | tuple[Count, Count]
    patch_size: Count
    eval_crop: PositiveFraction
    layer_scale: Positive

    @property
    def encoder_depth(self) -> int:
        return self.depth or ENCODER_SIZES[self.name][0]

    @property
    def encoder_width(self) -> int:
        return self.width or ENCODER_SIZES[self.name][1]

    @property
    def encoder_num_heads(self) -> int:
        return self.num_heads or ENCODER_SIZES[self.name][2]

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.size_px
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @model_validator(mode="after")
    def fits(self) -> Self:
        for side in self.size_px:
            if side % self.patch_size:
                raise ValueError(
                    f"patch_size: {self.patch_size} does not divide image_size {side}; "
                    f"the nearest size that fits is {max(1, round(side / self.patch_size)) * self.patch_size}"
                )
        check_heads(self.encoder_width, self.encoder_num_heads, "num_heads", "width")
        return self


class OptimizationConfig(Section):
    """What every training stage has: how long, how fast, how it is regularised."""

    epochs: Count
    batch_size: Count
    lr: Positive
    min_lr: NonNegative
    warmup_epochs: NonNegative
    weight_decay: NonNegative

    @model_validator(mode="after")
    def schedule_fits(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs} must be below epochs {self.epochs}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr {self.lr}")
        return self


class CropConfig(Section):
    """Random resized crop and flip: share of the area kept, chance of a flip."""

    crop_scale: tuple[PositiveFraction, PositiveFraction]
    flip: Fraction

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale: {list(self.crop_scale)} must be [smallest, largest]")
        return self


class TokenizerConfig(OptimizationConfig, CropConfig):
    kind: Literal["dvae", "pixels", "dalle"]
    normalize_pixels: bool
    dalle_encoder: str
    dalle_decoder: str
    vocab_size: Annotated[int, Field(ge=2)]
    code_width: Count
    hidden_width: Count
    num_res_blocks: CountOrZero
    temperature_start: Positive
    temperature_end: Positive
    usage_weight: NonNegative
    min_perplexity: Annotated[float, Field(ge=1)]

    @model_validator(mode="after")
    def reachable(self) -> Self:
        if self.min_perplexity > self.vocab_size:
            raise ValueError(
                f"min_perplexity: {self.min_perplexity} cannot be reached with a vocab_size of {self.vocab_size}"
            )
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end: {self.temperature_end} is above temperature_start {self.temperature_start}"
            )
        return self


class MaskConfig(Section):
    kind: Literal["block", "random"]
    ratio: Annotated[float, Field(gt=0)]
    min_block: PositiveFraction


class PretrainConfig(OptimizationConfig, CropConfig):
    start_from: str | None
    clip_grad: Positive
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    mask: MaskConfig
    alignment_weight: NonNegative
    alignment_warmup_epochs: NonNegative
    alignment_drop_path: bool
    predictor_width: Count | None
    predictor_num_heads: Count | None
    predictor_layer_scale: Positive | None
    regressor_depth: Count
    decoder_depth: Count
    checkpoint_every_steps: Count
    log_every_steps: Count


class FinetuneConfig(OptimizationConfig, CropConfig):
    layer_decay: PositiveFraction
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    relative_position_bias: bool
    rand_augment: Annotated[str, Field(pattern=r"^rand(-(m|n|p|mstd|mmax|inc|w|t)[0-9.]+)*$")] | None
    mixup: NonNegative
    cutmix: NonNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    random_erase: Fraction
    checkpoint_every_steps: Count

    @model_validator(mode="after")
    def pairs_fit(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size: {self.batch_size} must be even, for mixup and cutmix mix images in pairs")
        return self


class HeadConfig(OptimizationConfig, CropConfig):
    """A head trained on a frozen encoder."""

    @model_validator(mode="after")
    def batch_has_a_variance(self) -> Self:
        if self.batch_size < 2:
            raise ValueError("batch_size: 1 is too small for the head's BatchNorm; expected at least 2")
        return self


class AttentiveConfig(HeadConfig):
    use_class_token: bool


class NeighborConfig(Section):
    k: Count
    temperature: Positive
    feature: Literal["pooled", "class_token"]


class ProbeConfig(Section):
    cache_features: bool
    linear: HeadConfig
    attentive: AttentiveConfig
    knn: NeighborConfig


class GateConfig(Section):
    num_train_images: Annotated[int, Field(ge=2)]
    num_val_images: Count
    min_mean_cosine: Annotated[float, Field(ge=-1, le=1)]
    min_worst_cosine: Annotated[float, Field(ge=-1, le=1)]
    max_top1_drop: Fraction


class ExportConfig(Section):
    opset: Annotated[int, Field(ge=18)]
    num_parity_images: Count
    max_abs_diff: Positive
    min_token_agreement: Fraction
    num_examples: CountOrZero
    int8: bool
    fp16: bool
    gate: GateConfig


class Params(Section):
    """All of params.yaml."""

    seed: CountOrZero
    runtime: RuntimeConfig
    prepare: PrepareConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    probe: ProbeConfig
    export: ExportConfig

    @property
    def num_masked(self) -> int:
        """Patches masked in every image, exactly."""
        return round(self.pretrain.mask.ratio * self.model.num_patches)

    @property
    def predictor_width(self) -> int:
        return self.pretrain.predictor_width or self.model.encoder_width

    @property
    def predictor_num_heads(self) -> int:
        return self.pretrain.predictor_num_heads or self.model.encoder_num_heads

    def architecture(self, channels: int, num_outputs: int) -> Architecture:
        """Sizes of the model for images of `channels` channels and a target of `num_outputs` values a patch."""
        return Architecture(
            channels=channels,
            grid=self.model.grid,
            patch_size=self.model.patch_size,
            depth=self.model.encoder_depth,
            width=self.model.encoder_width,
            num_heads=self.model.encoder_num_heads,
            predictor_width=self.predictor_width,
            predictor_num_heads=self.predictor_num_heads,
            regressor_depth=self.pretrain.regressor_depth,
            decoder_depth=self.pretrain.decoder_depth,
            num_outputs=num_outputs,
            layer_scale=self.model.layer_scale,
            predictor_layer_scale=self.pretrain.predictor_layer_scale or self.model.layer_scale,
        )

    @model_validator(mode="after")
    def parts_fit(self) -> Self:
        patches = self.model.num_patches
        if not 1 <= self.num_masked < patches:
            raise ValueError(
                f"pretrain.mask.ratio: {self.pretrain.mask.ratio} masks {self.num_masked} of {patches} patches; "
                "at least one must be masked and one visible"
            )
        check_heads(
            self.predictor_width, self.predictor_num_heads, "pretrain.predictor_num_heads", "pretrain.predictor_width"
        )
        patch_size = self.model.patch_size
        if self.tokenizer.kind == "dalle" and patch_size % DALLE_PATCH_PX:
            nearest = max(1, round(patch_size / DALLE_PATCH_PX)) * DALLE_PATCH_PX
            raise ValueError(
                f"model.patch_size: {patch_size} does not fit tokenizer.kind dalle, which has one token for "
                f"{DALLE_PATCH_PX} px: expected a multiple of {DALLE_PATCH_PX}, the nearest is {nearest}"
            )
        return self


def load_params(path: Path) -> Params:
    """Read and validate params.yaml; raise UserError naming every wrong key, what was expected and the nearest key."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run in the root of the project") from None
    return parse_params(read_sections(text, str(path)), str(path))


def read_sections(text: str | bytes, name: str) -> dict[str, Any]:
    """Nested dictionaries out of the text of a parameter file; raise UserError where it is no YAML or has no keys."""
    try:
        # YAML 1.2, in which 1e-3 is a number as it is for DVC, and a key given twice is an error.
        raw = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name}: expected sections such as `prepare:` and `model:`, found {type(raw).__name__}")
    return raw


def parse_params(raw: dict[str, Any], name: str = "params.yaml") -> Params:
    """Validate a nested dict as Params; raise UserError as `load_params` does."""
    try:
        return Params.model_validate(_lists_to_tuples(raw))
    except ValidationError as error:
        raise UserError("\n".join(f"{name}: {_explain(dict(item))}" for item in error.errors())) from None


def _lists_to_tuples(value: Any) -> Any:
    # Strict validation refuses a list where a tuple is declared, and YAML has only lists.
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    return tuple(_lists_to_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(item: dict[str, Any]) -> str:
    # Pydantic appends the branch of a union to the location; a key of params.yaml has no such part.
    parts = [str(part) for part in item["loc"]]
    key = ".".join(part for part in parts if "[" not in part and part not in ("int", "tuple", "constrained-int"))
    if item["type"] == "extra_forbidden":
        return unknown_key(parts, _section_keys(parts[:-1]))
    if item["type"] == "missing":
        return f"{key}: missing; add it (the shipped params.yaml shows every key)"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{key}.{message}" if key else message
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {item['input']!r}"


def unknown_key(parts: list[str], known: list[str]) -> str:
    """What is said of a key that its section does not know: the nearest one, and all that are known there."""
    nearest = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0)
    suggestion = ".".join([*parts[:-1], nearest[0]])
    return f"{'.'.join(parts)}: unknown key; did you mean `{suggestion}`? (known here: {', '.join(known)})"


def _section_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = Params
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
