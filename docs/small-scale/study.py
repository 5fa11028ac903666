"""The small-scale study: variants of the embedded default, each pretrained and probed by the pipeline itself.

    python docs/small-scale/study.py run FOLDER [NAME ...]    run variants, two at a time, in clones below FOLDER
    python docs/small-scale/study.py collect FOLDER           gather what is finished: results.json, curves.png and,
                                                              of the pixel variants, figure3.png, beside this file

`docs/small-scale.md` says what came out. Every variant states all that it changes against BASE, and BASE states every
value under study, so the study means the same when the default moves.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import figures, params_file
from pipeline.pictures import Studio
from pipeline.workspace import Workspace

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAGES = ("probe@linear", "probe@knn")
BASE: dict[str, Any] = {
    "seed": 0,
    "tokenizer.vocab_size": 256,
    "tokenizer.epochs": 6,
    "tokenizer.min_perplexity": 16,
    "model.depth": 6,
    "model.width": 128,
    "model.num_heads": 4,
    "pretrain.epochs": 8,
    "pretrain.warmup_epochs": 2,
    "pretrain.batch_size": 64,
    "pretrain.lr": 0.001,
    "pretrain.mask.kind": "block",
    "pretrain.mask.ratio": 0.5,
    "pretrain.alignment_weight": 0.2,
    "pretrain.alignment_warmup_epochs": 0,
    "pretrain.regressor_depth": 2,
    "pretrain.decoder_depth": 2,
    "pretrain.crop_scale": [0.6, 1.0],
}
# What the first half of the study found, which the second half starts from.
FOUND = {"pretrain.mask.kind": "random", "pretrain.mask.ratio": 0.75, "pretrain.lr": 0.002}
PIXELS = {**FOUND, "tokenizer.kind": "pixels", "pretrain.epochs": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "λ 0": {"pretrain.alignment_weight": 0.0},
    "λ 0.5": {"pretrain.alignment_weight": 0.5},
    "λ 1": {"pretrain.alignment_weight": 1.0},
    "λ 2": {"pretrain.alignment_weight": 2.0},
    "λ 2, warm-up 4": {"pretrain.alignment_weight": 2.0, "pretrain.alignment_warmup_epochs": 4},
    "λ 10, lr 0.002": {"pretrain.alignment_weight": 10.0, "pretrain.lr": 0.002},
    "lr 0.002": {"pretrain.lr": 0.002},
    "batch 32": {"pretrain.batch_size": 32},
    "vocabulary 64": {"tokenizer.vocab_size": 64},
    "epochs 16": {"pretrain.epochs": 16},
    "mask random 0.75": {"pretrain.mask.kind": "random", "pretrain.mask.ratio": 0.75},
    "random 0.75, lr 0.002": FOUND,
    "random 0.75, lr 0.002, λ 0": {**FOUND, "pretrain.alignment_weight": 0.0},
    "random 0.75, lr 0.002, λ 2": {**FOUND, "pretrain.alignment_weight": 2.0},
    "random 0.75, lr 0.002, depth 4": {**FOUND, "model.depth": 4},
    "random 0.75, lr 0.002, width 192": {**FOUND, "model.width": 192, "model.num_heads": 6},
    **{
        f"pixels, λ {weight:g}, seed {seed}": {**PIXELS, "pretrain.alignment_weight": weight, "seed": seed}
        for seed in range(3)
        for weight in (1.0, 0.0)
    },
}
CURVES = ("λ 0", "base", "λ 2", "random 0.75, lr 0.002, λ 2", "λ 10, lr 0.002", "random 0.75, lr 0.002")


def place_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace(",", "")


def is_finished(place: Path) -> bool:
    return all((place / f"metrics/{stage}.json").exists() for stage in ("probe_linear", "probe_knn"))


def run(folder: Path, names: list[str]) -> None:
    """Run the named variants that are not finished; each in its own clone, on one core."""

    def one(name: str) -> None:
        place = place_of(folder, name)
        if is_finished(place):
            return
        if not place.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
        # One cache for all, so that a tokenizer which several variants share is trained once.
        subprocess.run(["dvc", "cache", "dir", "--local", str(folder / "cache")], cwd=place, check=True)
        params = params_file.read(place / "params.yaml")
        for key, value in {**BASE, **VARIANTS[name]}.items():
            params_file.change(params, key, value, name)
        params_file.write(place / "params.yaml", params_file.text_of(params))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}
        with (place / "study.log").open("w") as log:
            subprocess.run(["dvc", "repro", *STAGES], cwd=place, env=environment, stdout=log, stderr=log, check=True)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, names))


def collect(folder: Path) -> None:
    """Write every finished variant's metrics and curves; draw the curves and Figure 3."""
    results = {name: describe(place_of(folder, name), name) for name in VARIANTS if is_finished(place_of(folder, name))}
    (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for name, result in results.items():
        linear, pretrain = result["metrics"]["probe_linear"], result["metrics"]["pretrain"]
        figures_shown = (
            linear["top1"],
            linear["pooled_top1"],
            result["metrics"]["probe_knn"]["top1"],
            pretrain["decoding_loss"],
            pretrain["alignment_loss"],
            pretrain["latent_variance"],
            min(row["latent_variance"] for row in result["curve"]),
        )
        sys.stdout.write(f"| {name} | " + " | ".join(f"{value:.3f}" for value in figures_shown) + " |\n")
    draw_curves({name: results[name]["curve"] for name in CURVES if name in results})
    draw_figure3({name: place_of(folder, name) for name in results if name.startswith("pixels")})


def describe(place: Path, name: str) -> dict[str, Any]:
    metrics = {path.stem: json.loads(path.read_text()) for path in sorted((place / "metrics").glob("*.json"))}
    (log,) = place.glob("scratch/pretrain-*/log.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    keys = ("step", "decoding_loss", "alignment_loss", "latent_variance")
    curve = [{key: float(f"{row[key]:.4g}") for key in keys} for row in rows]
    return {"changes": VARIANTS[name], "metrics": metrics, "curve": curve}


def draw_curves(runs: dict[str, list[dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), dpi=figures.DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    for place, key, title in (
        (axes[0], "latent_variance", "variance of the representation over patches"),
        (axes[1], "alignment_loss", "alignment loss"),
    ):
        for name, rows in runs.items():
            place.plot([row["step"] for row in rows], [row[key] for row in rows], label=name, linewidth=1.5)
        place.set_title(title, loc="left", fontsize=10)
        place.set_xlabel("step")
        place.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE / "curves.png")


def draw_figure3(runs: dict[str, Path]) -> None:
    """The whole image through encoder and decoder, no regressor; and how near it comes, printed."""
    rows = []
    for name, place in runs.items():
        studio = Studio(Workspace(place, place / "params.yaml"))
        images = studio.sample("val", 8).images
        rows = rows or [("image", figures.columns_of(images))]
        label = name.removeprefix("pixels, ").replace(", ", "\n")
        rows.append((label, figures.columns_of(studio.without_regressor(images))))
        sys.stdout.write(f"| {name} | {studio.psnr_db()[2]:.1f} dB |\n")
    if rows:
        figures.sheet(HERE / "figure3.png", rows)


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    if command == "run":
        run(Path(target).resolve(), rest or list(VARIANTS))
    else:
        collect(Path(target).resolve())
