"""Stage `report`: one self-contained page about the last run, and its pictures as PNG files."""

import base64
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cae.train.device import Hardware
from pipeline.pretrain import COLLAPSED_VARIANCE
from pipeline.results import accuracies
from pipeline.sections import Section, metrics_of, sections
from pipeline.workspace import METRIC_STAGES, Workspace, published

LIBRARIES = ("torch", "timm", "dvc", "onnxruntime-gpu", "numpy", "pillow", "scikit-learn")
GLOSSARY = {
    "patch": "A small square of the image; the model sees an image as a grid of patches.",
    "masked, visible": "In pretraining some patches are hidden (masked); the others are visible.",
    "encoder": "The part that is kept: it turns patches into representations, lists of numbers that other tasks use.",
    "tokenizer, code": "A small network that describes every patch by one entry of a codebook, its code. "
    "The codes of the masked patches are what the model learns to predict.",
    "regressor": "Predicts the representations of masked patches from those of the visible ones.",
    "decoder": "Turns predicted representations into codes, or pixels.",
    "alignment": "The pull of the predicted representations towards those that the encoder gives when it sees the "
    "masked patches. λ (pretrain.alignment_weight) is its strength.",
    "random weights": "The same network without any training: what a figure is worth must be seen beside it.",
    "class token": "One extra entry beside the patches, in which the encoder can gather the whole image.",
    "mean of patches": "The average of the representations of all patches of an image.",
    "probe": "A classifier trained with labels on the frozen encoder's output; it measures the encoder and leaves "
    "it as it is. The linear probe is the simplest, one weighted sum for each class; the attentive probe also learns "
    "which patches to read.",
    "nearest neighbours": "The most similar training images vote; nothing is trained.",
    "fine-tuning": "The whole encoder is trained further, with labels.",
    "validation images": "Images kept out of every training; all results are measured on them.",
    "top-1 accuracy": "Share of the validation images whose most likely class is the right one.",
    "PSNR": "Likeness of two images in decibels, higher is better: 20 is rough, 30 is good, 6 more halve the typical "
    "error of a pixel.",
    "perplexity": "How evenly the codes are used: as varied as this many codes used equally often. Codes that are rare "
    "count little, so it is below the number in use.",
}


def run(workspace: Workspace) -> None:
    """Write `report/index.html` and `report/figures`."""
    torch.manual_seed(workspace.params.seed)
    with published(workspace.report) as folder:
        drawings = folder / "figures"
        drawings.mkdir()
        page = render(workspace, sections(workspace, drawings), drawings)
        (folder / "index.html").write_text(page)


def render(workspace: Workspace, parts: list[Section], drawings: Path) -> str:
    """The page; every picture is inside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    shown = [
        {
            **vars(part),
            "pictures": [
                {**picture._asdict(), "base64": base64.b64encode((drawings / picture.file).read_bytes()).decode()}
                for picture in part.pictures
            ],
        }
        for part in parts
    ]
    index = workspace.index
    return environment.get_template("report.html.j2").render(
        title=f"Context Autoencoder on {index.source}",
        summary=_summary(workspace),
        alarms=_alarms(workspace),
        tokens=workspace.params.tokenizer.kind != "pixels",
        labelled=bool(index.classes),
        cached=workspace.params.probe.cache_features,
        cards=_cards(workspace),
        sections=shown,
        timings=_timings(workspace),
        environment=_environment(workspace),
        params=(workspace.root / workspace.params_file).read_text(),
        glossary=list(GLOSSARY.items()),
    )


def _summary(workspace: Workspace) -> str:
    index, params = workspace.index, workspace.params
    rows, columns = params.model.grid
    text = (
        f"A neural network ({params.model.name}, a vision transformer of {params.model.encoder_depth} layers, width "
        f"{params.model.encoder_width}) learned from {index.count['train']:,} images without labels (pretraining). "
        f"Each image is cut into {rows} × {columns} = {rows * columns} small squares (patches); {params.num_masked} of "
        "them are hidden and the network predicts them from the rest. "
    )
    linear = metrics_of(workspace, "probe_linear")
    if "top1" in linear:
        text += (
            "To measure what it learned it is frozen, and a simple classifier is trained with labels on its output: "
            f"it names {linear['top1']:.1%} of {index.count['val']:,} images correctly that were kept out of training. "
            f"On the same network without any training (random weights) that is {linear['random_init_top1']:.1%}; "
            f"blind guessing gives {1 / len(index.classes):.1%}."
        )
    else:
        text += "The images have no labels, so nothing here is measured against classes."
    if index.channels not in (1, 3):
        drawn = "the first as grey" if index.channels == 2 else "the first three as red, green and blue"
        text += f" The images have {index.channels} channels; the pictures on this page show {drawn}."
    return text


def _alarms(workspace: Workspace) -> list[str]:
    alarms = []
    variance = metrics_of(workspace, "pretrain")["latent_variance"]
    if variance < COLLAPSED_VARIANCE:
        alarms.append(
            f"The representation has collapsed: its variance over the patches of an image is {variance:.3g}, below "
            f"{COLLAPSED_VARIANCE}. Lower pretrain.alignment_weight or pretrain.lr, or let λ grow slowly "
            "(pretrain.alignment_warmup_epochs), and run again."
        )
    linear = metrics_of(workspace, "probe_linear")
    if "top1" in linear and linear["top1"] <= linear["random_init_top1"]:
        alarms.append(
            "The linear probe finds no more in the pretrained encoder than in random weights: it has learned too "
            "little. Most often the training was too short: raise pretrain.epochs."
        )
    return alarms


def _cards(workspace: Workspace) -> list[dict[str, str]]:
    cards = []
    for row in accuracies(workspace):
        if row.pretrained and row.random:
            beside = f"random weights {row.random.mean:.1%}"
            cards.append({"value": f"{row.pretrained.mean:.1%}", "what": row.label, "beside": beside})
    tokenizer = metrics_of(workspace, "tokenizer")
    if "usage" in tokenizer:
        beside = f"perplexity {tokenizer['perplexity']:.0f}, PSNR {tokenizer['psnr_db']:.1f} dB"
        cards.append(
            {
                "value": f"{tokenizer['usage']:.0%}",
                "what": f"of {tokenizer['num_codes']} tokenizer codes in use",
                "beside": beside,
            }
        )
    return cards


def _timings(workspace: Workspace) -> list[list[str]]:
    rows = []
    for stage in METRIC_STAGES:
        values = metrics_of(workspace, f"efficiency/{stage}")
        if "wall_s" in values:
            rate = f"{values['images_per_s']:,.0f}" if "images_per_s" in values else ""
            wait = f"{values['data_wait_fraction']:.0%}" if "data_wait_fraction" in values else ""
            rows.append([stage, f"{values['wall_s']:.0f} s", rate, wait])
    return rows


def _environment(workspace: Workspace) -> list[tuple[str, str]]:
    hardware = Hardware.choose(workspace.params.runtime)
    device = (
        torch.cuda.get_device_name() if hardware.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    index = workspace.index
    return [
        ("data", f"{index.source}: {index.count['train']:,} training and {index.count['val']:,} validation images"),
        ("seed", str(workspace.params.seed)),
        ("device", f"{device}, {hardware.precision}"),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)),
        ("cae-pipe", _version("cae-pipe")),
    ]


def _version(package: str) -> str:
    """Of a package, which a checkout that was not installed, or a stage that ran without DVC, does not have."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
