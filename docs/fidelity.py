"""A checkpoint with the keys and shapes of a published one and random weights, imported, exported and compared.

python -m docs.fidelity base|large FOLDER   (in the root of the project; 3 to 8 GB of disk and memory)
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

from cae.positions import sincos_positions
from cae.weights import load_trained
from pipeline.graphs import EncoderGraph
from serving.bundle import Bundle
from tests.official import reference_weight

NUM_IMAGES = 8
TIMM_NAMES = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224"}


def write_checkpoint(size: str, path: Path) -> int:
    """All keys of the published checkpoint, the alignment encoder a copy; return how many."""
    state = {}
    for line in Path(f"tests/data/official_cae_{size}_keys.tsv").read_text().splitlines()[1:]:
        key, text = line.split("\t")
        shape = tuple(map(int, text.split("x")))
        if key.endswith("pos_embed"):
            state[key] = sincos_positions((14, 14), shape[-1])[None]
        else:
            # Gains as in training, or two dozen random layers would give nothing but large numbers.
            state[key] = 0.4 * reference_weight(key.removeprefix("alignment_"), shape)
    torch.save({"model": state, "epoch": 1599, "optimizer": {"state": {}}}, path)
    return len(state)


def run(*command: str) -> None:
    print("$ cae-pipe", *command, flush=True)  # noqa: T201
    subprocess.run(["cae-pipe", *command], check=True)


@torch.inference_mode()
def main(size: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    checkpoint, imported, bundle, exported, back = (
        str(folder / name) for name in ("official.pth", "imported", "bundle", "timm", "back")
    )
    num_keys = write_checkpoint(size, Path(checkpoint))
    run("import", "official", checkpoint, "--out", imported)
    run("export", "--checkpoint", imported, "--out", bundle)
    run("export", "--checkpoint", imported, "--out", exported, "--format", "timm")
    run("import", "timm", exported, "--out", back)

    trained = load_trained(Path(imported))
    graph = EncoderGraph(trained.encoder, trained.normalization).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 3, 224, 224), dtype=np.uint8))
    ours = graph.features(images)
    model = timm.create_model(TIMM_NAMES[size], num_classes=0, init_values=1.0).eval()
    model.load_state_dict(load_file(f"{exported}/model.safetensors"), strict=True)
    tokens = model.forward_features(graph.normalize(images.float() / 255))
    served = Bundle.open(Path(bundle), "cpu").embed(images.numpy())
    first, again = trained.encoder.state_dict(), load_trained(Path(back)).encoder.state_dict()
    identical = first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    figures = {
        "keys": num_keys,
        "timm, patches": float((tokens[:, 1:] - ours["patches"]).abs().max()),
        "timm, class token": float((tokens[:, 0] - ours["class_token"]).abs().max()),
        **{f"ONNX Runtime, {name}": float(np.abs(served[name] - ours[name].numpy()).max()) for name in served},
        "largest feature": float(ours["patches"].abs().max()),
        "native → timm → native identical": identical,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.2g}" if isinstance(value, float) else f"{name}: {value}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
