"""What the report shows of a model, as arrays: completions, reconstructions, attention, t-SNE, nearest neighbours."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor

from cae.config import MaskConfig
from cae.data.shards import Split
from cae.heads import AttentiveHead
from cae.masking import MaskSampler
from cae.storage import load_into, read_weights
from cae.targets import hide, patchify
from cae.targets.files import load_target
from cae.weights import load_trained, random_encoder
from pipeline.batches import Evaluation, draw_masks, spread_over_classes, unit_range
from pipeline.graphs import EncoderGraph, ReconstructorGraph, SkipReconstructorGraph
from pipeline.workspace import Workspace

CHUNK = 64
# As many patches as t-SNE places in seconds, from as many images.
TSNE_PATCHES, TSNE_IMAGES = 1500, 150
# A patch whose pixels vary less than this share of the data's deviation is background and says nothing of a class.
FLAT_SHARE = 0.25
BANK_IMAGES = 2000
# Kinds of mask shown beside the one of the training.
MASKS = (("random", 0.5), ("random", 0.75), ("block", 0.5), ("random", 0.9))
PSNR_IMAGES = 200


class Sample(NamedTuple):
    """Images after evaluation preprocessing, uint8 [b, c, h, w], and the name of each one's class ('' without)."""

    images: Tensor
    labels: list[str]


class Completion(NamedTuple):
    """One kind of mask: what the model saw and what it made of it, float32 [b, c, h, w] in 0-1."""

    name: str
    seen: Tensor
    completed: Tensor


class Embedding(NamedTuple):
    """Patches as points in the plane, [n, 2], by the pretrained and by the random encoder, and each one's class."""

    pretrained: np.ndarray
    random: np.ndarray
    labels: list[str]


class Neighbors(NamedTuple):
    """For every query its nearest training images, most similar first, and their cosine similarities [q, k]."""

    nearest: list[Sample]
    similarity: np.ndarray


class Studio:
    """The pretrained model and its data, to be looked at; everything runs on the CPU in float32."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.trained = load_trained(workspace.pretrained)
        assert self.trained.cae is not None
        self.target = load_target(workspace.target)
        self.grid, self.patch_size = self.trained.architecture.grid, self.trained.architecture.patch_size
        self.encoder, self.random = (
            EncoderGraph(encoder, self.trained.normalization).eval()
            for encoder in (self.trained.encoder, random_encoder(self.trained, workspace.params.seed))
        )
        drawing = self.trained.cae, self.trained.normalization, self.target
        self.completer, self.copier = ReconstructorGraph(*drawing), SkipReconstructorGraph(*drawing)

    def sample(self, split: Split, count: int) -> Sample:
        """`count` images of a split, the classes in turn, so that each is seen."""
        shards = self.workspace.shards(split)
        positions = spread_over_classes(shards, count)
        transform = Evaluation(self.workspace.preprocessing())
        images = np.stack([transform(shards.image(position)) for position in positions])
        classes, labels = shards.index.classes, [shards.label(position) for position in positions]
        names = [classes[label] if label >= 0 else "" for label in labels]
        return Sample(torch.from_numpy(images), names)

    @torch.inference_mode()
    def tokenized(self, images: Tensor) -> Tensor:
        """Every image by way of its targets and back: the best that a completion can be."""
        return self.target.decode(self.target.encode(self.target.view(unit_range(images)))).clamp(0, 1)

    @torch.inference_mode()
    def completions(self, images: Tensor) -> list[Completion]:
        """The masked patches of `images` predicted from the visible ones, for several kinds of mask."""
        mask = self.workspace.params.pretrain.mask
        kinds: list[tuple[str, MaskConfig]] = [(f"{_mask_name(mask.kind, mask.ratio)}\n(as in training)", mask)]
        for kind, ratio in MASKS:
            if (kind, ratio) == (mask.kind, mask.ratio):
                continue
            kinds.append((_mask_name(kind, ratio), mask.model_copy(update={"kind": kind, "ratio": ratio})))
        num_patches = self.grid[0] * self.grid[1]
        result = []
        for name, config in kinds:
            num_masked = min(max(round(config.ratio * num_patches), 1), num_patches - 1)
            sampler = MaskSampler(self.grid, num_masked, config.kind, config.min_block)
            visible, masked = draw_masks(sampler, self.workspace.params.seed, range(len(images)))
            reconstruction, _ = self.completer(images, visible, masked)
            unit = unit_range(images)
            middle = torch.full((unit.shape[1],), 0.5)
            seen = hide(unit, visible, middle, self.patch_size)
            hidden = hide(torch.ones_like(unit), visible, torch.zeros_like(middle), self.patch_size) == 0
            result.append(Completion(name, seen, torch.where(hidden, reconstruction, unit)))
        return result

    @torch.inference_mode()
    def without_regressor(self, images: Tensor) -> Tensor:
        """The whole image, nothing masked, from the encoder straight into the decoder (Figure 3)."""
        return torch.cat([self.copier(chunk)[0] for chunk in images.split(CHUNK)])

    def psnr_db(self) -> tuple[float, float, float]:
        """Of validation images: their mean colour, by way of the targets, by way of encoder and decoder (Figure 3)."""
        images = self.sample("val", PSNR_IMAGES).images
        unit = unit_range(images)
        plain = unit.mean(dim=(0, 2, 3), keepdim=True).expand_as(unit)
        drawn = (plain, self.tokenized(images), self.without_regressor(images))
        first, second, third = (psnr_db(picture, unit) for picture in drawn)
        return first, second, third

    @torch.inference_mode()
    def class_attention(self, images: Tensor, random: bool = False) -> np.ndarray:
        """Attention of the class token to every patch in the last block, mean over heads, [b, rows, columns]."""
        graph = self.random if random else self.encoder
        return graph.features(images)["class_attention"].mean(dim=1).unflatten(1, self.grid).numpy()

    @torch.inference_mode()
    def probe_attention(self, images: Tensor) -> np.ndarray | None:
        """Attention of the attentive probe's query to every patch, mean over heads; None where no probe was trained."""
        path = self.workspace.probe("attentive") / "attentive.safetensors"
        if not path.exists():
            return None
        state, metadata = read_weights(path, "attentive")
        architecture = self.trained.architecture
        head = AttentiveHead(architecture.width, architecture.num_heads, len(metadata["classes"]))
        load_into(head, state, path)
        attention = head.eval().attention(self.encoder.features(images)["patches"])
        return attention.mean(dim=1).unflatten(1, self.grid).numpy()

    @torch.inference_mode()
    def patch_embedding(self) -> Embedding:
        """t-SNE of the representations of patches that are not plain background (Figure 6)."""
        sample = self.sample("val", TSNE_IMAGES)
        pixels = patchify(unit_range(sample.images), self.patch_size)
        flat = FLAT_SHARE * float(np.mean(self.trained.normalization.std))
        candidates = np.flatnonzero((pixels.std(dim=-1) > flat).flatten().numpy())
        rng = np.random.default_rng(self.workspace.params.seed)
        chosen = rng.permutation(candidates)[:TSNE_PATCHES]
        num_patches = pixels.shape[1]
        labels = [sample.labels[patch // num_patches] for patch in chosen]
        # Below four points there is no neighbourhood to keep.
        perplexity = min(30, max(1, (len(chosen) - 1) // 3))
        points = []
        for graph in (self.encoder, self.random):
            patches = torch.cat([graph.features(chunk)["patches"] for chunk in sample.images.split(CHUNK)]).flatten(
                0, 1
            )
            tsne = TSNE(perplexity=perplexity, random_state=self.workspace.params.seed, init="pca")
            points.append(tsne.fit_transform(patches[torch.from_numpy(chosen)].numpy()))
        return Embedding(points[0], points[1], labels)

    @torch.inference_mode()
    def neighbors(self, queries: Tensor, count: int) -> Neighbors:
        """The training images whose mean patch representation is most similar to each query's."""
        bank = self.sample("train", BANK_IMAGES)
        keys, values = (
            F.normalize(torch.cat([self.encoder.features(chunk)["pooled"] for chunk in images.split(CHUNK)]), dim=1)
            for images in (queries, bank.images)
        )
        similarity, positions = (keys @ values.T).topk(min(count, len(values)), dim=1)
        nearest = [Sample(bank.images[row], [bank.labels[i] for i in row.tolist()]) for row in positions]
        return Neighbors(nearest, similarity.numpy())


def _mask_name(kind: str, ratio: float) -> str:
    return f"{ratio:.0%} hidden,\n{'in blocks' if kind == 'block' else 'at random'}"


def psnr_db(images: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels of images in 0-1."""
    return float(-10 * F.mse_loss(images, truth).clamp_min(1e-10).log10())


def half_mass(attention: np.ndarray) -> np.ndarray:
    """Of attention [rows, columns] the fewest patches that hold half of the mass, bool [rows, columns] (Figure 4)."""
    flat = attention.reshape(-1)
    order = np.argsort(-flat, kind="stable")
    needed = int(np.searchsorted(np.cumsum(flat[order]), flat.sum() / 2)) + 1
    chosen = np.zeros(flat.shape, dtype=bool)
    chosen[order[:needed]] = True
    return chosen.reshape(attention.shape)
