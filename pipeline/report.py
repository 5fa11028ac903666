"""Stage `report`: one self-contained page about the last run, and its pictures as PNG files."""

import base64
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cae.train.device import Hardware
from pipeline.pretrain import COLLAPSED_VARIANCE
from pipeline.results import accuracies
from pipeline.sections import Section, metrics_of, sections
from pipeline.workspace import METRIC_STAGES, Workspace

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
    "probe": "A small classifier on the frozen encoder's representations; it measures them and changes nothing.",
    "top-1 accuracy": "Share of the validation images whose most likely class is the right one.",
    "PSNR": "Likeness of two images in decibels; 20 is rough, 30 is good, 6 more halve the error.",
    "perplexity": "How many codes would be in use if all of them were used equally often.",
}


def run(workspace: Workspace) -> None:
    """Write `report/index.html` and `report/figures`."""
    torch.manual_seed(workspace.params.seed)
    with workspace.publish(workspace.report) as folder:
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
        f"A vision transformer ({params.model.name}, {params.model.encoder_depth} layers, width "
        f"{params.model.encoder_width}) was pretrained on {index.count['train']:,} images without labels: "
        f"it learned to predict {params.num_masked} hidden patches of {rows} × {columns} from the others. "
    )
    linear = metrics_of(workspace, "probe_linear")
    if "top1" in linear:
        text += (
            f"A linear classifier on its frozen representations names {linear['top1']:.1%} of "
            f"{index.count['val']:,} validation images correctly; of the same network with random weights, "
            f"{linear['random_init_top1']:.1%}."
        )
    else:
        text += "The images have no labels, so nothing here is measured against classes."
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
        beside = f"perplexity {tokenizer['perplexity']:.0f}, {tokenizer['psnr_db']:.1f} dB"
        cards.append(
            {"value": f"{tokenizer['usage']:.0%}", "what": "of the tokenizer's codes in use", "beside": beside}
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
        ("libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)),
        ("cae-pipe", version("cae-pipe")),
    ]
