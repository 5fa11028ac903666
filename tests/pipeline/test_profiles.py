"""Profiles: the paper's numbers down to the built model, and how overlays and `--set` change a file."""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cae.errors import UserError
from cae.heads import Classifier
from cae.model import ContextAutoencoder, Encoder
from cae.normalization import Normalization
from cae.positions import sincos_positions
from cae.targets.dvae import Dvae
from cae.train.optimizer import adamw, cosine_schedule
from pipeline import profiles, tokenizer
from tests.tiny import ROOT

PARAMS = ROOT / "params"


@dataclass(frozen=True)
class Size:
    """What the paper gives a size of ViT, and the weights of its encoder in millions."""

    name: str
    weights_m: float
    depth: int
    predictor: tuple[int, int, float]  # width, heads, layer scale
    layer_scale: float
    finetune: tuple[int, float, float]  # epochs, learning rate, layer decay


# Section 5.1 and appendix A; predictor and layer scales of ViT-L as released.
SIZES = {
    "s": Size("vit_small", 21.7, 12, (384, 6, 0.1), 0.1, (200, 1.6e-2, 0.75)),
    "b": Size("vit_base", 85.7, 12, (768, 12, 0.1), 0.1, (100, 8e-3, 0.65)),
    "l": Size("vit_large", 303.2, 24, (768, 12, 0.1), 1e-5, (50, 2e-3, 0.75)),
}
WARMUP_EPOCHS = {300: 10, 800: 20, 1600: 40}
PAPER = [(size, epochs) for size in SIZES for epochs in WARMUP_EPOCHS]
IMAGENET_TRAIN = 1_281_167


def count_m(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(("size", "epochs"), PAPER)
def test_a_profile_of_the_paper_has_its_numbers(size: str, epochs: int) -> None:
    paper, params = SIZES[size], profiles.read(PARAMS, f"vit-{size}-{epochs}").params
    pretrain, finetune, probe = params.pretrain, params.finetune, params.probe

    assert (params.prepare.source, params.prepare.channels) == ("folder:data/imagenet", 3)
    assert (params.model.name, params.model.size_px, params.model.grid) == (paper.name, (224, 224), (14, 14))
    assert params.model.eval_crop == 0.875
    assert (params.tokenizer.kind, params.tokenizer.vocab_size) == ("dvae", 8192)

    assert (pretrain.epochs, pretrain.warmup_epochs) == (epochs, WARMUP_EPOCHS[epochs])
    assert (pretrain.batch_size, pretrain.lr, pretrain.min_lr, pretrain.weight_decay) == (2048, 1.5e-3, 1e-5, 0.05)
    assert (pretrain.drop_path, pretrain.clip_grad) == (0.1, 3.0)
    assert (pretrain.crop_scale, pretrain.flip) == ((0.08, 1.0), 0.5)
    assert (pretrain.mask.kind, params.num_masked, round(pretrain.mask.min_block * 196)) == ("block", 98, 16)
    assert (pretrain.alignment_weight, pretrain.alignment_warmup_epochs) == (2.0, 0)

    assert (finetune.epochs, finetune.lr, finetune.layer_decay) == paper.finetune
    assert (finetune.batch_size, finetune.warmup_epochs, finetune.weight_decay) == (4096, 5, 0.05)
    assert (finetune.rand_augment, finetune.mixup, finetune.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert (finetune.label_smoothing, finetune.random_erase) == (0.1, 0.25)

    assert not probe.cache_features
    for head, batch_size, lr in ((probe.linear, 16384, 6.4), (probe.attentive, 8192, 0.4)):
        assert (head.epochs, head.warmup_epochs, head.batch_size, head.lr) == (90, 10, batch_size, lr)
        assert (head.weight_decay, head.crop_scale, head.flip) == (0.0, (0.08, 1.0), 0.5)
    assert not probe.attentive.use_class_token


@pytest.mark.parametrize(("size", "epochs"), PAPER)
def test_a_profile_of_the_paper_builds_its_model_tokenizer_and_optimizers(size: str, epochs: int) -> None:
    paper, params = SIZES[size], profiles.read(PARAMS, f"vit-{size}-{epochs}").params
    architecture = params.architecture(channels=3, num_outputs=params.tokenizer.vocab_size)
    with torch.device("meta"):
        model = ContextAutoencoder(architecture, params.pretrain.drop_path)
        dvae = build_tokenizer(params, architecture.channels)
        pooled = architecture.model_copy(update={"final_norm": "pooled"})
        classifier = Classifier(Encoder(pooled), architecture.width, num_classes=1000)

    assert count_m(model.encoder) == pytest.approx(paper.weights_m, rel=0.01)
    assert len(model.encoder.blocks) == paper.depth
    assert (len(model.regressor.blocks), len(model.decoder.blocks)) == (4, 4)
    width, heads, predictor_scale = paper.predictor
    assert model.regressor.mask_query.shape[-1] == model.positions.shape[-1] == width
    assert model.decoder.blocks[0].get_submodule("attn").num_heads == heads
    assert model.decoder.head.out_features == dvae.num_outputs == dvae.codebook.shape[0] == 8192
    assert (architecture.layer_scale, architecture.predictor_layer_scale) == (paper.layer_scale, predictor_scale)
    assert [block.drop_path.rate for block in (model.encoder.blocks[0], model.encoder.blocks[-1])] == [
        0,
        pytest.approx(0.1),
    ]

    finetune = params.finetune
    groups = adamw(classifier, finetune, finetune.layer_decay).param_groups
    scales = {group["lr_scale"] for group in groups}
    # The embedding, every block, the head: the head learns at the full rate, the embedding slowest.
    assert len(scales) == paper.depth + 2
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(paper.finetune[2] ** (paper.depth + 1))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}

    per_epoch = IMAGENET_TRAIN / params.pretrain.batch_size
    schedule = cosine_schedule(adamw(model, params.pretrain), params.pretrain, IMAGENET_TRAIN)
    assert schedule.warmup_t == round(WARMUP_EPOCHS[epochs] * per_epoch)
    assert schedule.warmup_t + schedule.t_initial == math.ceil(epochs * per_epoch)


def build_tokenizer(params: profiles.Params, channels: int) -> Dvae:
    return tokenizer.build(params, Normalization([0.5] * channels, [0.25] * channels))


def test_cifar10_builds_its_model_and_tokenizer() -> None:
    params = profiles.read(PARAMS, "cifar10").params
    assert params.prepare.source == "cifar10"
    assert (params.model.size_px, params.model.grid, params.num_masked) == ((32, 32), (8, 8), 48)
    assert (params.pretrain.flip, params.pretrain.crop_scale) == (0.5, (0.3, 1.0))
    with torch.device("meta"):
        model = ContextAutoencoder(params.architecture(3, params.tokenizer.vocab_size))
        dvae = build_tokenizer(params, channels=3)
        logits = dvae.logits(torch.zeros(2, 3, 32, 32))
        visible, masked = (torch.zeros(2, count, dtype=torch.int64) for count in (16, 48))
        output = model(torch.zeros(2, 3, 32, 32), visible, masked)
    assert logits.shape == (2, params.tokenizer.vocab_size, 8, 8)
    assert output.prediction.shape == (2, 48, params.tokenizer.vocab_size)


def test_every_profile_is_valid_and_says_what_it_is() -> None:
    names = profiles.names(PARAMS)
    assert {f"vit-{size}-{epochs}" for size, epochs in PAPER} < set(names)
    assert names.index("vit-b-300") < names.index("vit-b-800") < names.index("vit-b-1600")
    for name in names:
        profile = profiles.read(PARAMS, name)
        assert profile.about, name
        assert sincos_positions(profile.params.model.grid, profile.params.predictor_width).isfinite().all()


def test_the_default_profile_is_the_shipped_file() -> None:
    shipped, default = ((ROOT / place).read_text() for place in ("params.yaml", "params/default.yaml"))
    assert shipped == default, "after a change of the embedded default: cp params.yaml params/default.yaml"


def test_the_overlay_that_the_documentation_shows_is_valid(folder: Path) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (folder / "shown.yaml").write_text(shown)
    assert profiles.read(folder, "shown").params.model.num_patches == 144


# Merging, on small files of our own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(PARAMS, tmp_path / "params")
    return tmp_path / "params"


def overlay(folder: Path, text: str, name: str = "mine") -> None:
    (folder / f"{name}.yaml").write_text(f"# Mine\nextends: default.yaml\n{text}")


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_an_overlay_changes_its_lines_and_no_others(folder: Path) -> None:
    # A text longer than the comment's column moves all that follows.
    source = "folder:/a/place/of/many/images"
    ratio = "pretrain:\n  mask:\n    ratio: 0.25   # a quarter\n"
    overlay(folder, f"prepare: {{source: {source}}}\nmodel:\n  image_size: [28, 56]\n{ratio}")
    before = (folder / "default.yaml").read_text().splitlines()
    after = profiles.read(folder, "mine").text.splitlines()
    assert after[:2] == ["# Mine", "# Written by `cae-pipe profile apply mine`."]
    # The origin is one line more than the line that it replaces.
    changed = [(old, new) for old, new in zip(before[1:], after[2:], strict=True) if old != new]
    line = next(line for line in before if line.startswith("  source: mnist5k "))
    assert changed == [
        (line, f"  source: {source} {line[line.index('#') :]}"),
        (
            "  image_size: 28              # pixels, one number or [height, width]",
            "  image_size: [28, 56]        # pixels, one number or [height, width]",
        ),
        (
            "    ratio: 0.75               # share of the patches that is masked, exactly",
            "    ratio: 0.25               # a quarter",
        ),
    ]


def test_an_overlay_may_extend_another_and_the_last_word_counts(folder: Path) -> None:
    overlay(folder, "pretrain: {epochs: 20, lr: 3.0e-3}\n")
    (folder / "theirs.yaml").write_text("# Theirs\nextends: mine.yaml\npretrain:\n  epochs: 30\n")
    profile = profiles.read(folder, "theirs", ["pretrain.warmup_epochs=3", "seed=7"])
    assert (profile.params.pretrain.epochs, profile.params.pretrain.lr) == (30, 3e-3)
    assert (profile.params.pretrain.warmup_epochs, profile.params.seed) == (3, 7)
    assert "apply theirs --set pretrain.warmup_epochs=3 --set seed=7" in profile.text


def test_null_may_be_written_or_left_out(folder: Path) -> None:
    base = (folder / "default.yaml").read_text()
    bare = re.sub(r"depth: null .*", "depth:", base, count=1).replace("width: null  ", "width:  ", 1)
    (folder / "default.yaml").write_text(bare)
    overlay(folder, "model:\n  depth: 3\n  width: 64\nfinetune:\n  rand_augment:\n")
    profile = profiles.read(folder, "mine")
    assert (profile.params.model.depth, profile.params.model.width) == (3, 64)
    assert profile.params.finetune.rand_augment is None
    assert line_of(profile.text, "rand_augment").startswith("  rand_augment: null  ")
    assert line_of(profile.text, "width").split() == line_of(base, "width").replace(": null", ": 64").split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrain:\n  epoch: 3\n", "pretrain.epoch: unknown key; did you mean `pretrain.epochs`\\? .*warmup_epochs"),
        ("pretrian:\n  epochs: 3\n", "pretrian: unknown key; did you mean `pretrain`\\?"),
        ("pretrain:\n  mask: 3\n", "pretrain.mask: is a section; expected one of its keys: kind, ratio, min_block"),
        ("pretrain:\n  epochs:\n    lr: 3\n", "pretrain.epochs: is a value without keys of its own, found lr"),
        ("pretrain:\n  epochs: many\n", "pretrain.epochs: input should be a valid integer, found 'many'"),
        ("pretrain:\n  warmup_epochs: 99\n", "pretrain.warmup_epochs: 99.0 must be below epochs"),
        ("seed: 1\nseed: 2\n", 'not valid YAML(.|\n)*duplicate key "seed"'),
        ("seed: [1\n", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_an_overlay_is_named_by_file_and_key(folder: Path, text: str, expected: str) -> None:
    overlay(folder, text)
    with pytest.raises(UserError, match=rf"^{re.escape(str(folder))}/mine\.yaml: {expected}"):
        profiles.read(folder, "mine")


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("defualt.yaml", r"extends: expected a parameter file.* 'defualt\.yaml'; did you mean `default\.yaml`"),
        ("[default.yaml]", r"extends: expected a parameter file.* \['default\.yaml'\]"),
        ("mine.yaml", "extends leads back to this file"),
        ("../params/mine.yaml", "extends leads back to this file"),
    ],
)
def test_extends_names_a_file_that_is_there_and_ends_somewhere(folder: Path, extends: str, expected: str) -> None:
    (folder / "mine.yaml").write_text(f"extends: {extends}\n")
    with pytest.raises(UserError, match=expected):
        profiles.read(folder, "mine")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("pretrain.epoch=3", "pretrain.epoch: unknown key; did you mean `pretrain.epochs`?"),
        ("pretrain=3", "pretrain: is a section; expected one of its keys: start_from"),
        ("pretrain.epochs.x=3", "pretrain.epochs: is a value without keys of its own, found x"),
        ("pretrain.epochs", "expected key=value"),
        ("pretrain.epochs=", "expected key=value"),
        ("=3", "expected key=value"),
        ("prepare.source=a: b", "expected one value"),
        ("prepare.source=folder:x # y", "expected one value"),
        ("prepare.source=[a", "not a YAML value"),
        ("pretrain.epochs=x", "pretrain.epochs: input should be a valid integer, found 'x'"),
    ],
)
def test_a_wrong_change_is_named(change: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"--set {re.escape(change)}: {re.escape(expected)}"):
        profiles.read(PARAMS, "default", [change])


def test_an_unknown_profile_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no profile 'vit-b-30'; did you mean `vit-b-300`\? \(known: .*vit-s-1600"):
        profiles.read(PARAMS, "vit-b-30")
