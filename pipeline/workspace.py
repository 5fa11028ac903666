"""Where everything lies. No other module of the project knows a path."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cae.config import Params, load_params
from cae.data.remote import open_shards
from cae.data.shards import ImageShards, Index, Split
from serving.preprocess import Preprocessing

PRETRAINED = "models/pretrain"
TARGET_NAME = "target.safetensors"
# Whose metrics describe a model, in the order of the pipeline.
METRIC_STAGES = (
    "prepare",
    "tokenizer",
    "pretrain",
    "finetune",
    "probe_linear",
    "probe_attentive",
    "probe_knn",
    "export",
)


@dataclass(frozen=True)
class Workspace:
    """A checkout of the project: its parameters and the places that the stages read and write.

    With `weights` the stages after pretraining use those in place of the pipeline's, and with `results` they write
    there. With `force` a training goes on from a checkpoint that was made with other parameters, data or code.
    """

    root: Path
    params_file: Path
    weights: Path | None = None
    results: Path | None = None
    force: bool = False

    @classmethod
    def here(cls) -> "Workspace":
        """The current folder, where DVC runs every stage."""
        return cls(Path.cwd(), Path("params.yaml"))

    def forced(self) -> "Workspace":
        """The same with `force`."""
        return replace(self, force=True)

    def measuring(self, weights: Path, results: Path) -> "Workspace":
        """The same with other trained weights, and a folder of its own for what the stages make of them."""
        return replace(self, weights=weights, results=results)

    @cached_property
    def params(self) -> Params:
        return load_params(self.params_file)

    @property
    def profiles(self) -> Path:
        return self.root / "params"

    @property
    def prepared(self) -> Path:
        return self.root / "data/prepared"

    @property
    def downloads(self) -> Path:
        return self.root / "data/downloads"

    @property
    def target(self) -> Path:
        return self.root / "models/tokenizer" / TARGET_NAME

    @property
    def pretrained(self) -> Path:
        """Folder of the trained weights."""
        return self.weights or self.root / PRETRAINED

    @property
    def made(self) -> Path:
        return self.results or self.root

    @property
    def finetuned(self) -> Path:
        return self.made / "models/finetune"

    @property
    def bundle(self) -> Path:
        return self.root / "models/bundle"

    @property
    def metrics(self) -> Path:
        return self.made / "metrics"

    @property
    def scratch(self) -> Path:
        return self.made / "scratch"

    @property
    def seeds(self) -> Path:
        return self.root / "seeds.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def probe(self, name: str) -> Path:
        return self.made / f"models/probe/{name}"

    def dependency(self, name: str) -> Path:
        """Where an entry of `deps` in dvc.yaml lies."""
        return self.pretrained if name == PRETRAINED else self.root / name

    def curves(self, stage: str) -> Path:
        return self.metrics / "curves" / stage

    @cached_property
    def index(self) -> Index:
        return Index.read(self.prepared)

    def shards(self, split: Split) -> ImageShards:
        """The prepared images of a split."""
        # Not under `scratch`: what measures other weights reads the same images.
        return open_shards(self.prepared, split, self.root / "scratch/shards")

    def preprocessing(self) -> Preprocessing:
        """Evaluation preprocessing of the prepared images, as the server will do it."""
        height, width = self.params.model.size_px
        return Preprocessing(
            channels=self.index.channels,
            height=height,
            width=width,
            crop_fraction=self.params.model.eval_crop,
            resample="bicubic",
        )

    def write_metrics(self, stage: str, quality: dict[str, Any], efficiency: dict[str, float]) -> None:
        """`metrics/STAGE.json` for what is the same in every run, `metrics/efficiency/STAGE.json` for what is not."""
        for path, values in ((f"{stage}.json", quality), (f"efficiency/{stage}.json", efficiency)):
            target = self.metrics / path
            target.parent.mkdir(parents=True, exist_ok=True)
            rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in values.items()}
            target.write_text(json.dumps(rounded, indent=2) + "\n")

    def read_metrics(self, stage: str) -> dict[str, Any] | None:
        """What `write_metrics` wrote as quality, or None; `efficiency/STAGE` for what it wrote as efficiency."""
        path = self.metrics / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error."""
    folder = folder.absolute()
    # Beside its destination, so that the last step is a rename on one filesystem.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
