"""The small-scale study: variants of the embedded default, each pretrained and probed by the pipeline itself.

    python docs/small-scale/study.py run FOLDER [NAME ...]    run variants, two at a time, in clones below FOLDER
    python docs/small-scale/study.py collect FOLDER FILE      gather every finished variant's figures into FILE

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

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES = ("probe@linear", "probe@knn")
BASE: dict[str, Any] = {
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
RANDOM_75 = {"pretrain.mask.kind": "random", "pretrain.mask.ratio": 0.75}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "λ 2": {"pretrain.alignment_weight": 2.0},
    "λ 2, warm-up 4": {"pretrain.alignment_weight": 2.0, "pretrain.alignment_warmup_epochs": 4},
    "λ 0": {"pretrain.alignment_weight": 0.0},
    "λ 1": {"pretrain.alignment_weight": 1.0},
    "λ 0.5": {"pretrain.alignment_weight": 0.5},
    "lr 0.002": {"pretrain.lr": 0.002},
    "lr 0.0005": {"pretrain.lr": 0.0005},
    "mask random 0.5": {"pretrain.mask.kind": "random"},
    "mask random 0.75": {"pretrain.mask.kind": "random", "pretrain.mask.ratio": 0.75},
    "mask block 0.4": {"pretrain.mask.ratio": 0.4},
    "mask block 0.6": {"pretrain.mask.ratio": 0.6},
    "batch 32": {"pretrain.batch_size": 32},
    "batch 128": {"pretrain.batch_size": 128},
    "vocabulary 64": {"tokenizer.vocab_size": 64},
    "vocabulary 512": {"tokenizer.vocab_size": 512},
    "epochs 16": {"pretrain.epochs": 16},
    "depth 4": {"model.depth": 4},
    "width 192": {"model.width": 192, "model.num_heads": 6},
    "predictor depth 1": {"pretrain.regressor_depth": 1, "pretrain.decoder_depth": 1},
    "predictor depth 4": {"pretrain.regressor_depth": 4, "pretrain.decoder_depth": 4},
    "λ 2, lr 0.0005": {"pretrain.alignment_weight": 2.0, "pretrain.lr": 0.0005},
    "λ 1, lr 0.002, warm-up 4": {
        "pretrain.alignment_weight": 1.0,
        "pretrain.lr": 0.002,
        "pretrain.alignment_warmup_epochs": 4,
    },
    "λ 10, lr 0.002": {"pretrain.alignment_weight": 10.0, "pretrain.lr": 0.002},
    "crop 0.3": {"pretrain.crop_scale": [0.3, 1.0]},
    "random 0.75, lr 0.002": {**RANDOM_75, "pretrain.lr": 0.002},
    "random 0.75, lr 0.002, λ 1": {**RANDOM_75, "pretrain.lr": 0.002, "pretrain.alignment_weight": 1.0},
    "random 0.75, lr 0.002, λ 2": {**RANDOM_75, "pretrain.lr": 0.002, "pretrain.alignment_weight": 2.0},
    "random 0.75, lr 0.002, λ 0": {**RANDOM_75, "pretrain.lr": 0.002, "pretrain.alignment_weight": 0.0},
    "random 0.75, lr 0.002, batch 32": {**RANDOM_75, "pretrain.lr": 0.002, "pretrain.batch_size": 32},
    "random 0.75, lr 0.002, width 192": {
        **RANDOM_75,
        "pretrain.lr": 0.002,
        "model.width": 192,
        "model.num_heads": 6,
    },
    "random 0.75, lr 0.003": {**RANDOM_75, "pretrain.lr": 0.003},
    "random 0.85, lr 0.002": {**RANDOM_75, "pretrain.mask.ratio": 0.85, "pretrain.lr": 0.002},
    "base, seed 1": {"seed": 1},
    "base, seed 2": {"seed": 2},
}


def run(folder: Path, names: list[str], revision: str) -> None:
    """Run the named variants that are not finished; each in its own clone of `revision`, on one core."""
    yaml = YAML()

    def one(name: str) -> None:
        place = folder / name.replace(" ", "_").replace(",", "")
        if (place / "metrics/probe_knn.json").exists():
            return
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
        subprocess.run(["git", "checkout", "--quiet", revision], cwd=place, check=True)
        # One cache for all, so that a tokenizer which several variants share is trained once.
        subprocess.run(["dvc", "cache", "dir", "--local", str(folder / "cache")], cwd=place, check=True)
        params = yaml.load(place / "params.yaml")
        for key, value in {**BASE, **VARIANTS[name]}.items():
            *sections, last = key.split(".")
            section = params
            for part in sections:
                section = section[part]
            section[last] = value
        yaml.dump(params, place / "params.yaml")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}
        with (place / "study.log").open("w") as log:
            subprocess.run(["dvc", "repro", *STAGES], cwd=place, env=environment, stdout=log, stderr=log, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, names))


def collect(folder: Path, file: Path) -> None:
    """Write every finished variant's metrics and latent variance over the steps as one JSON file."""
    results = {}
    for name in VARIANTS:
        place = folder / name.replace(" ", "_").replace(",", "")
        if not (place / "metrics/probe_knn.json").exists():
            continue
        metrics = {path.stem: json.loads(path.read_text()) for path in sorted((place / "metrics").glob("*.json"))}
        logs = list(place.glob("scratch/pretrain-*/log.jsonl"))
        rows = [json.loads(line) for line in logs[0].read_text().splitlines()] if logs else []
        keys = ("step", "decoding_loss", "alignment_loss", "latent_variance")
        curve = [{key: round(row[key], 4) for key in keys} for row in rows[4::5]]
        wall_s = json.loads((place / "metrics/efficiency/pretrain.json").read_text())["wall_s"]
        results[name] = {"changes": VARIANTS[name], "metrics": metrics, "wall_s": wall_s, "curve": curve}
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    if command == "run":
        run(Path(target).resolve(), rest or list(VARIANTS), os.environ.get("REVISION", "HEAD"))
    else:
        collect(Path(target), Path(rest[0]))
