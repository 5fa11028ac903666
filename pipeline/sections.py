"""The sections of the report: what each shows, and the sentences that say how to read it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import figures, seeds
from pipeline.pictures import Sample, Studio
from pipeline.results import accuracies
from pipeline.workspace import Workspace

NUM_IMAGES = 8
NUM_QUERIES, NUM_NEIGHBORS = 5, 7


class Picture(NamedTuple):
    """A file among the drawings and what it shows; `scrolls` on a phone, where it would shrink beyond recognition."""

    file: str
    alt: str
    scrolls: bool = True


@dataclass
class Section:
    """One part of the page."""

    id: str
    short: str
    title: str
    text: str
    pictures: list[Picture]
    table: list[list[str]] = field(default_factory=list)
    note: str = ""


def sections(workspace: Workspace, drawings: Path) -> list[Section]:
    """Draw every picture into `drawings`; what the run has no material for is left out."""
    studio = Studio(workspace)
    sample = studio.sample("val", NUM_IMAGES)
    parts = [
        _accuracies(workspace, drawings),
        _training(workspace, drawings),
        _tokenizer(studio, sample, drawings),
        _completions(studio, sample, drawings),
        _without_regressor(studio, sample, drawings),
        _class_attention(studio, sample, drawings),
        _probe_attention(studio, sample, drawings),
        _patches(studio, drawings),
        _neighbors(studio, drawings),
    ]
    return [part for part in parts if part]


def metrics_of(workspace: Workspace, stage: str) -> dict[str, Any]:
    """Metrics of a stage, or none."""
    return workspace.read_metrics(stage) or {}


def _accuracies(workspace: Workspace, drawings: Path) -> Section | None:
    runs = seeds.comparable(workspace)
    bars, table = [], [["top-1 accuracy in %", "pretrained", "random weights", "gain in points"]]
    for row in accuracies(workspace):
        if row.pretrained and row.random:
            bars.append((row.label, *row.pretrained, *row.random))
            gain = f"{100 * (row.pretrained.mean - row.random.mean):+.1f}"
            table.append([row.label, str(row.pretrained), str(row.random), gain])
    if not bars:
        return None
    figures.accuracy_bars(drawings / "accuracy.png", bars)
    spread = (
        f"Mean ± standard deviation over the seeds {', '.join(str(run['params']['seed']) for run in runs)} "
        "(seeds.json); everything else on this page is of the last run."
        if len(runs) > 1
        else "One run; `cae-pipe seeds 0 1 2` adds the spread over seeds."
    )
    return Section(
        id="accuracy",
        short="Accuracy",
        title="What pretraining gives",
        text="The encoder never saw a label. Each row asks in another way how much it knows about the classes all the "
        "same, beside an encoder of the same shape with random weights. Fine-tuning trains the whole encoder with "
        "labels, from both starts, with the same few epochs.",
        table=table,
        pictures=[
            Picture("accuracy.png", "Bars: accuracy of the pretrained encoder beside random weights", scrolls=False)
        ],
        note=spread,
    )


def _training(workspace: Workspace, drawings: Path) -> Section:
    chosen = {
        "pretrain": (
            ("decoding_loss", "pretrain: decoding loss"),
            ("alignment_loss", "pretrain: alignment loss"),
            ("latent_variance", "pretrain: variance over patches"),
        ),
        "tokenizer": (
            ("reconstruction_loss", "tokenizer: reconstruction loss"),
            ("perplexity", "tokenizer: codes in use (perplexity)"),
        ),
        "finetune": (("loss", "fine-tuning: loss"),),
    }
    panels = []
    for stage, names in chosen.items():
        for name, title in names:
            path = workspace.curves(stage) / f"{name}.tsv"
            if path.exists():
                steps, values = np.loadtxt(path, skiprows=1, ndmin=2).T
                panels.append((title, steps, values))
    figures.curves(drawings / "curves.png", panels)
    pretrain = metrics_of(workspace, "pretrain")
    accuracy = (
        f" At the end it names the right code for {pretrain['token_accuracy']:.1%} of the masked patches of images "
        f"that it was not trained on; chance would be {1 / workspace.params.tokenizer.vocab_size:.1%}."
        if "token_accuracy" in pretrain
        else f" At the end the masked pixels are predicted to {pretrain['masked_psnr_db']:.1f} dB."
    )
    return Section(
        id="training",
        short="Training",
        title="How the training went",
        text="The decoding loss should fall and go on falling. The variance of the representation over the patches of "
        f"an image dips at first and must recover: near 0 all patches look alike to the encoder.{accuracy}",
        pictures=[Picture("curves.png", "Curves of the losses over the steps of each training")],
        note="The alignment loss may rise while the representation grows richer; only its size beside the variance "
        "says anything.",
    )


def _tokenizer(studio: Studio, sample: Sample, drawings: Path) -> Section | None:
    if studio.target.kind == "pixels":
        return None
    values = metrics_of(studio.workspace, "tokenizer")
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("from its\ncodes", figures.columns_of(studio.tokenized(sample.images))),
    ]
    figures.sheet(drawings / "tokenizer.png", rows)
    return Section(
        id="tokenizer",
        short="Tokenizer",
        title="What the tokenizer keeps of an image",
        text="Each patch is described by a single code, and drawn again from it. What is lost here cannot be asked of "
        f"the model. {values['usage']:.0%} of {studio.target.num_outputs} codes are in use; drawn again, the "
        f"validation images are {values['psnr_db']:.1f} dB away from themselves.",
        pictures=[Picture("tokenizer.png", "Validation images above, the same images from their codes below")],
    )


def _completions(studio: Studio, sample: Sample, drawings: Path) -> Section:
    rows = [("image", figures.columns_of(sample.images))]
    for completion in studio.completions(sample.images):
        rows.append((f"seen\n{completion.name}", figures.columns_of(completion.seen)))
        rows.append(("completed", figures.columns_of(completion.completed)))
    figures.sheet(drawings / "completions.png", rows)
    return Section(
        id="completions",
        short="Completions",
        title="What it makes of hidden patches",
        text="Grey patches are hidden from the model; it fills them in from the others. The mask is of one kind in "
        "training and of other kinds here, to see what carries over. Where several answers are possible it must choose "
        "patch by patch, so neighbours need not agree.",
        pictures=[
            Picture("completions.png", "Rows: images, what the model saw under several masks, what it completed")
        ],
    )


def _without_regressor(studio: Studio, sample: Sample, drawings: Path) -> Section:
    best, reached = studio.psnr_db()
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("encoder →\ndecoder", figures.columns_of(studio.without_regressor(sample.images))),
    ]
    figures.sheet(drawings / "without_regressor.png", rows)
    bound = f" (the codes alone would allow {best:.1f} dB)" if studio.target.kind != "pixels" else ""
    return Section(
        id="without-regressor",
        short="Without regressor",
        title="Encoder straight into decoder (the paper's Figure 3)",
        text="In training the decoder only ever reads what the regressor predicts. Here it reads the encoder's own "
        "representations of the whole image instead. If the image comes back, prediction happened in the encoder's "
        f"space, which is what the alignment is for. Reached: {reached:.1f} dB{bound}.",
        pictures=[
            Picture("without_regressor.png", "Images above, what the decoder draws from the encoder's output below")
        ],
    )


def _class_attention(studio: Studio, sample: Sample, drawings: Path) -> Section:
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("pretrained", figures.columns_of(sample.images, studio.class_attention(sample.images))),
        ("random\nweights", figures.columns_of(sample.images, studio.class_attention(sample.images, random=True))),
    ]
    figures.sheet(drawings / "class_attention.png", rows)
    return Section(
        id="class-attention",
        short="Class attention",
        title="Where the class token looks (Figure 4)",
        text="Attention of the class token to the patches in the last layer, mean over the heads: bright is much. The "
        "yellow contour holds the fewest patches that have half of all attention.",
        pictures=[
            Picture("class_attention.png", "Attention maps over validation images, pretrained and random weights")
        ],
    )


def _probe_attention(studio: Studio, sample: Sample, drawings: Path) -> Section | None:
    attention = studio.probe_attention(sample.images)
    if attention is None:
        return None
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("attentive\nprobe", figures.columns_of(sample.images, attention)),
    ]
    figures.sheet(drawings / "probe_attention.png", rows)
    return Section(
        id="probe-attention",
        short="Probe attention",
        title="Where the attentive probe looks (Figure 5)",
        text="The attentive probe learns with labels which patches to read: the bright ones. The yellow contour "
        "holds half of its attention; it should lie on the object.",
        pictures=[Picture("probe_attention.png", "Attention of the attentive probe over validation images")],
    )


def _patches(studio: Studio, drawings: Path) -> Section:
    embedding = studio.patch_embedding()
    figures.scatter(drawings / "patches.png", embedding)
    color = (
        "Every point has the colour of its image's class, for single patches have no label"
        if any(embedding.labels)
        else "The images have no labels, so the points have no colour"
    )
    return Section(
        id="patches",
        short="Patch map",
        title="The representations of patches as a map (Figure 6)",
        text="t-SNE puts patches whose representations are alike near each other. After pretraining, patches of one "
        f"class should gather more than with random weights. {color}; {len(embedding.labels):,} patches that are "
        "not plain background.",
        pictures=[Picture("patches.png", "Two scatter plots: patches by the pretrained and by the random encoder")],
        note="The paper colours by the category of the pixels; a stroke or a corner that many classes share has no "
        "colour of its own here, so mixed groups are expected.",
    )


def _neighbors(studio: Studio, drawings: Path) -> Section:
    queries = studio.sample("val", NUM_QUERIES)
    neighbors = studio.neighbors(queries.images, NUM_NEIGHBORS)
    figures.sheet(drawings / "neighbors.png", figures.neighbor_rows(queries, neighbors))
    framed = " Blue frames share the class of the image asked for, orange ones do not." if any(queries.labels) else ""
    return Section(
        id="neighbors",
        short="Neighbours",
        title="What it finds alike",
        text="At the left a validation image, beside it the training images whose mean representation is most similar "
        f"(cosine, in the caption). No label is used in the search.{framed}",
        pictures=[Picture("neighbors.png", "Validation images and their nearest training images")],
    )
