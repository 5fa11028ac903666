"""Example images of a bundle: what the server's page offers to try it with."""

from pathlib import Path

import numpy as np
from PIL import Image

from cae.weights import Trained
from pipeline.batches import fits_prepared, spread_over_classes
from pipeline.workspace import Workspace


def write_examples(workspace: Workspace, trained: Trained, folder: Path) -> list[str]:
    """Write `export.num_examples` validation images into `folder` as PNG, the classes in turn; return their names.

    They are stored as prepared, before the model's crop, which a server makes itself. None where no prepared images fit
    the model, or where a PNG cannot hold its channels.
    """
    if trained.architecture.channels not in (1, 3) or not fits_prepared(workspace, trained):
        return []
    shards = workspace.shards("val")
    names = []
    for number, position in enumerate(spread_over_classes(shards, workspace.params.export.num_examples)):
        image = shards.image(position)
        assert isinstance(image, Image.Image)
        names.append(f"example_{number}.png")
        # Pixels alone: a profile or a remark of the file it came from is not for others.
        Image.fromarray(np.asarray(image)).save(folder / names[-1], optimize=True)
    return names
