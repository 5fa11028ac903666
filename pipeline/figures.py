"""The report's drawings, by matplotlib: arrays in, PNG files out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.pictures import Embedding, Neighbors, Sample, half_mass
from serving.preprocess import shown

PRETRAINED, RANDOM, WRONG, INK = "#0f6f8c", "#b9b4a9", "#c2410c", "#26303a"
CONTOUR = "#ffb000"
CELL_INCH = 1.05
MIN_ASPECT = 0.5
DPI = 130
matplotlib.rcParams.update(
    {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#c9ced3",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#eceff1",
        "axes.axisbelow": True,
    }
)


class Cell(NamedTuple):
    """One picture of a sheet: an image [c, h, w], uint8 or float in 0-1, what is written under it, what lies on it.

    Of an image of other numbers of channels than 1 and 3 those that `shown` names are drawn.
    """

    image: Any
    caption: str = ""
    frame: str | None = None
    attention: np.ndarray | None = None  # [rows, columns], drawn as a contour around half of its mass


def sheet(path: Path, rows: Sequence[tuple[str, Sequence[Cell]]]) -> None:
    """Rows of pictures, each with its name at the left."""
    columns = max(len(cells) for _, cells in rows)
    captions = any(cell.caption for _, cells in rows for cell in cells)
    height_px, width_px = rows[0][1][0].image.shape[1:]
    # As tall as its images, but never less than three lines of a row's name.
    height = CELL_INCH * (max(height_px / width_px, MIN_ASPECT) + (0.22 if captions else 0.08))
    figure = Figure(figsize=(CELL_INCH * columns + 1.5, height * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, cells), row in zip(rows, axes, strict=True):
        for place in row:
            place.set_axis_off()
        for cell, place in zip(cells, row, strict=False):
            _draw_cell(place, cell)
        # A picture's own y label would go with the axes that are off.
        row[0].text(
            -0.12, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=10, linespacing=1.25
        )
    figure.savefig(path)


def _draw_cell(place: Any, cell: Cell) -> None:
    pixels = np.asarray(cell.image)
    height, width = pixels.shape[1:]
    channels = shown(pixels)
    picture = channels[0] if len(channels) == 1 else channels.transpose(1, 2, 0)
    limit = 255 if pixels.dtype == np.uint8 else 1
    place.imshow(picture, cmap="gray", vmin=0, vmax=limit, interpolation="nearest", extent=(0, width, height, 0))
    if cell.attention is not None:
        _draw_attention(place, cell.attention, (height, width))
    if cell.frame:
        place.add_patch(
            matplotlib.patches.Rectangle((0, 0), width, height, fill=False, edgecolor=cell.frame, linewidth=3)
        )
    if cell.caption:
        # By points, for a share of the height would put it into a low picture.
        offset: dict[str, Any] = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
        place.annotate(
            cell.caption, (0.5, 0), xycoords="axes fraction", fontsize=8.5, color=cell.frame or INK, **offset
        )


def _draw_attention(place: Any, attention: np.ndarray, size: tuple[int, int]) -> None:
    height, width = size
    shown = attention / attention.max()
    place.imshow(shown, cmap="inferno", alpha=0.55, interpolation="nearest", extent=(0, width, height, 0))
    # Enlarged and with a margin, so that the contour follows the edges of the patches and closes at the border.
    scale = 8
    inside = np.pad(half_mass(attention).repeat(scale, 0).repeat(scale, 1).astype(float), 1)
    rows, columns = attention.shape
    x = (np.arange(inside.shape[1]) - 0.5) / scale * width / columns
    y = (np.arange(inside.shape[0]) - 0.5) / scale * height / rows
    place.contour(x, y, inside, levels=[0.5], colors=CONTOUR, linewidths=1.8)


def accuracy_bars(path: Path, rows: Sequence[tuple[str, float, float, float, float]]) -> None:
    """One pair of bars a measurement: name, pretrained and its spread, random weights and its spread; fractions."""
    figure = Figure(figsize=(7.4, 0.75 * len(rows) + 0.9), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for place, (_, value, spread, baseline, baseline_spread) in enumerate(rows):
        for offset, height, error, color in (
            (-0.19, value, spread, PRETRAINED),
            (0.19, baseline, baseline_spread, RANDOM),
        ):
            bar = axes.barh(place + offset, 100 * height, 0.36, xerr=100 * error or None, color=color, ecolor=INK)
            axes.bar_label(bar, labels=[f"{100 * height:.1f}"], padding=4, fontsize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("correctly named images, %")
    axes.grid(axis="y", visible=False)
    axes.legend(
        handles=[matplotlib.patches.Patch(color=PRETRAINED), matplotlib.patches.Patch(color=RANDOM)],
        labels=["pretrained", "random weights"],
        loc="upper center",
        bbox_to_anchor=(0.45, 1.14),
        ncols=2,
        frameon=False,
    )
    figure.savefig(path)


def curves(path: Path, panels: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Line panels side by side: title, steps [n], values [n]."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place in axes[len(panels) :]:
        place.set_axis_off()
    for place, (title, steps, values) in zip(axes, panels, strict=False):
        place.plot(steps, values, color=PRETRAINED, linewidth=1.6)
        place.set_title(title, fontsize=10, loc="left")
        place.set_xlabel("step", fontsize=9)
        place.margins(x=0.02)
    figure.savefig(path)


def scatter(path: Path, embedding: Embedding) -> None:
    """t-SNE of patches by both encoders side by side, coloured by class."""
    names = sorted(set(embedding.labels))
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    shade = np.array([names.index(label) for label in embedding.labels])
    figure = Figure(figsize=(9.2, 4.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    for place, title, points in zip(
        axes, ("pretrained", "random weights"), (embedding.pretrained, embedding.random), strict=True
    ):
        for number, name in enumerate(names):
            chosen = points[shade == number]
            place.scatter(chosen[:, 0], chosen[:, 1], s=7, color=colors(number % colors.N), label=name, linewidths=0)
        place.set_title(title, fontsize=11)
        place.set_xticks([])
        place.set_yticks([])
        for spine in place.spines.values():
            spine.set_visible(False)
    if names != [""] and len(names) <= 20:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=10, markerscale=2.5, title="class"
        )
    figure.savefig(path)


def neighbor_rows(queries: Sample, neighbors: Neighbors) -> list[tuple[str, list[Cell]]]:
    """Rows of a sheet: the query, then its nearest images, framed by whether they share its class."""
    rows = []
    for number, nearest in enumerate(neighbors.nearest):
        label = queries.labels[number]
        cells = [Cell(queries.images[number], f"asked: {label}" if label else "asked")]
        for image, name, similarity in zip(nearest.images, nearest.labels, neighbors.similarity[number], strict=True):
            frame = None if not label else (PRETRAINED if name == label else WRONG)
            cells.append(Cell(image, f"{name}  {similarity:.2f}".strip(), frame))
        rows.append(("", cells))
    return rows


def columns_of(images: Tensor, attention: np.ndarray | None = None) -> list[Cell]:
    """One cell an image, with its attention where there is any."""
    maps = attention if attention is not None else [None] * len(images)
    return [Cell(image, attention=row) for image, row in zip(images, maps, strict=True)]
