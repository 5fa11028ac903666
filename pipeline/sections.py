"""The sections of the report: what each shows, and the sentences that say how to read it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import figures, seeds
from pipeline.pictures import BANK_IMAGES, Sample, Studio
from pipeline.pretrain import COLLAPSED_VARIANCE
from pipeline.results import accuracies
from pipeline.workspace import Workspace

NUM_IMAGES = 10
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
    bars, table = [], [["correctly named images, %", "pretrained", "random weights", "gain in points"]]
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
        else "One run only. From another random start the figures change a little; `cae-pipe seeds 0 1 2` repeats the "
        "run from three and shows by how much."
    )
    return Section(
        id="accuracy",
        short="Accuracy",
        title="What pretraining gives",
        text="In pretraining the encoder saw no labels. Each row then uses labels in another way, with the pretrained "
        "encoder and with one of random weights: the gain counts, not the height of a bar. In the rows of the probes "
        "the encoder stays frozen; an attentive probe learns much by itself, so it does well even on random weights. "
        f"Fine-tuning trains the whole encoder for {workspace.params.finetune.epochs} epochs, which from random "
        "weights may be too few to reach even the probes.",
        table=table,
        pictures=[
            Picture("accuracy.png", "Bars: accuracy of the pretrained encoder beside random weights", scrolls=False)
        ],
        note=spread,
    )


def _training(workspace: Workspace, drawings: Path) -> Section:
    chosen = {
        "pretrain": (
            ("decoding_loss", "pretrain: decoding loss ↓"),
            ("alignment_loss", "pretrain: alignment loss"),
            ("latent_variance", "pretrain: variance over patches"),
        ),
        "tokenizer": (
            ("reconstruction_loss", "tokenizer: reconstruction loss ↓"),
            ("perplexity", "tokenizer: perplexity of the codes"),
        ),
        "finetune": (("loss", "fine-tuning: loss ↓"),),
    }
    panels = []  # none where DVCLive was not there to draw them
    for stage, names in chosen.items():
        for name, title in names:
            path = workspace.curves(stage) / f"{name}.tsv"
            if path.exists():
                steps, values = np.loadtxt(path, skiprows=1, ndmin=2).T
                panels.append((title, steps, values))
    if panels:
        figures.curves(drawings / "curves.png", panels)
    pretrain = metrics_of(workspace, "pretrain")
    if "token_accuracy" in pretrain:
        vocab = metrics_of(workspace, "tokenizer")["num_codes"]
        reached = (
            f"It starts near {math.log(vocab):.1f}, the value of guessing. At the end the model names exactly the "
            f"right code for {pretrain['token_accuracy']:.1%} of the masked patches of validation images; guessing "
            f"among {vocab} codes gives {1 / vocab:.1%}."
        )
    else:
        psnr = pretrain["masked_psnr_db"]
        reached = f"At the end the masked pixels are predicted with a likeness of {psnr:.1f} dB (higher is better)."
    return Section(
        id="training",
        short="Training",
        title="How the training went",
        text=f"What is marked ↓ should fall; a step is one batch of images. The decoding loss says how well the hidden "
        f"patches are predicted. {reached} The variance tells how different the patches of an image look to the "
        f"encoder: it dips at first and must recover (alarm below {COLLAPSED_VARIANCE}).",
        pictures=[Picture("curves.png", "Curves of the losses over the steps of each training")] if panels else [],
        note="The alignment loss may rise while the representation grows richer. Compare it with the variance: giving "
        "every patch the average of its image would make the two equal, so below it is better. At the end, on "
        f"validation images: {pretrain['alignment_loss']:.2f} against {pretrain['latent_variance']:.2f}.",
    )


def _tokenizer(studio: Studio, sample: Sample, drawings: Path) -> Section | None:
    if not studio.target.predicts_tokens:
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
        f"the model. {values['usage']:.0%} of {studio.target.num_outputs} codes are in use. Drawn again from them, the "
        f"validation images are like the originals to {values['psnr_db']:.1f} dB (PSNR, higher is better: 20 is rough, "
        f"30 is good). The pictures on this page show the first {NUM_IMAGES} validation images, class by class.",
        pictures=[Picture("tokenizer.png", "Validation images above, the same images from their codes below")],
    )


def _completions(studio: Studio, sample: Sample, drawings: Path) -> Section:
    rows = [("image", figures.columns_of(sample.images))]
    for completion in studio.completions(sample.images):
        rows.append((completion.name, figures.columns_of(completion.seen)))
        rows.append(("filled in", figures.columns_of(completion.completed)))
    figures.sheet(drawings / "completions.png", rows)
    return Section(
        id="completions",
        short="Hidden patches",
        title="What it makes of hidden patches",
        text="Grey patches are hidden; everything else, plain black too, is shown to the model. Only the grey patches "
        "are filled in, the rest is the original. The first pair of rows hides patches as in training, the others in "
        "ways that it was not trained for. Each hidden patch is chosen on its own: neighbours need not fit together.",
        pictures=[
            Picture("completions.png", "Rows: images, what the model saw under several masks, what it completed")
        ],
    )


def _without_regressor(studio: Studio, sample: Sample, drawings: Path) -> Section:
    plain, best, reached = studio.psnr_db()
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("encoder →\ndecoder", figures.columns_of(studio.without_regressor(sample.images))),
    ]
    figures.sheet(drawings / "without_regressor.png", rows)
    bound = f", and the codes allow about {best:.1f} dB" if studio.target.predicts_tokens else ""
    return Section(
        id="without-regressor",
        short="Decoder test",
        title="Encoder straight into decoder (Figure 3 of the paper)",
        text="In training the decoder reads only what the regressor predicts for hidden patches. Here nothing is "
        "hidden, the regressor is left out, and the decoder reads the encoder's output directly. If the image comes "
        "back, the regressor predicts in the encoder's own terms, which is what the alignment is for. Likeness: "
        f"{reached:.1f} dB; a plain picture of the mean colour has {plain:.1f} dB{bound}. A broken image here takes "
        "nothing from the accuracies above, which use the encoder alone.",
        pictures=[
            Picture("without_regressor.png", "Images above, what the decoder draws from the encoder's output below")
        ],
    )


def _class_attention(studio: Studio, sample: Sample, drawings: Path) -> Section | None:
    if not studio.encoder.encoder.has_attention:
        return None
    rows = [
        ("image", figures.columns_of(sample.images)),
        ("pretrained", figures.columns_of(sample.images, studio.class_attention(sample.images))),
        ("random\nweights", figures.columns_of(sample.images, studio.class_attention(sample.images, random=True))),
    ]
    figures.sheet(drawings / "class_attention.png", rows)
    return Section(
        id="class-attention",
        short="Where it looks",
        title="Where the class token looks (Figure 4 of the paper)",
        text="How much the class token, the entry that gathers the whole image, reads from each patch in the last "
        "layer (mean over the heads): dark is little, yellow is much, each picture on a scale of its own. The outline "
        "holds the fewest patches that together get half of the attention.",
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
        short="Where the probe looks",
        title="Where the attentive probe looks (Figure 5 of the paper)",
        text="The attentive probe learns with labels which patches to read. Colours and outline as above; the outline "
        "should lie on the object. A patch that is outlined in every picture, such as a corner, says nothing about "
        "the single image.",
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
        title="The representations of patches as a map (Figure 6 of the paper)",
        text=f"Each point is one of {len(embedding.labels):,} patches that are not plain background; t-SNE puts "
        "patches with similar representations close together. Axes and the distances between groups mean nothing. Look "
        "at the colours, not at how tight the groups are: patches of one colour should be together more on the left "
        f"than on the right. {color}.",
        pictures=[Picture("patches.png", "Two scatter plots: patches by the pretrained and by the random encoder")],
        note="Many classes share strokes and corners, so mixed groups are normal. (The paper colours by the category "
        "of a patch's pixels, which takes images that are labelled pixel by pixel.)",
    )


def _neighbors(studio: Studio, drawings: Path) -> Section:
    queries = studio.sample("val", NUM_QUERIES)
    neighbors = studio.neighbors(queries.images, NUM_NEIGHBORS)
    figures.sheet(drawings / "neighbors.png", figures.neighbor_rows(queries, neighbors))
    framed = " Blue frames have the class of the image at the left, orange ones another." if any(queries.labels) else ""
    return Section(
        id="neighbors",
        short="Similar images",
        title="What it finds alike",
        text="At the left a validation image, beside it the most similar of "
        f"{min(BANK_IMAGES, studio.workspace.index.count['train']):,} training images, by the mean of their patches; "
        "no label is used in the search. Under each its similarity (cosine; 1 is the same, and only differences within "
        f"a row count).{framed}",
        pictures=[Picture("neighbors.png", "Validation images and their nearest training images")],
    )
