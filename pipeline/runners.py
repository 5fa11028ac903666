"""What computes features and reconstructions for the Python API: ONNX Runtime from a bundle, torch from weights."""

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from cae.errors import UserError
from cae.targets.dalle import full_float32
from cae.targets.files import AnyTarget
from cae.weights import Trained
from pipeline.checkpoints import preprocessing_of
from pipeline.graphs import EncoderGraph, ReconstructorGraph
from serving.bundle import Bundle, CapabilityError
from serving.bundle_info import ModelInfo, Output
from serving.preprocess import Preprocessing


class Runner(Protocol):
    """A model ready to run, in float32; `mask_ratio` is the share of patches that it was trained to complete."""

    info: ModelInfo
    preprocessing: Preprocessing
    mask_ratio: float | None

    def features(self, images: UInt8[np.ndarray, "b c h w"], output: Output) -> Float[np.ndarray, "b ..."]:
        """One output of the encoder; UserError where it does not have it."""
        ...

    def reconstruct(
        self,
        images: UInt8[np.ndarray, "b c h w"],
        visible: Int[np.ndarray, "b v"],
        masked: Int[np.ndarray, "b m"],
    ) -> Float[np.ndarray, "b c h w"]:
        """The images in 0-1 from their visible patches; UserError where there is no decoder or no target."""
        ...

    def check_reconstructor(self) -> None:
        """Raise UserError where there is no decoder or no target."""
        ...


class BundleRunner:
    """The graphs of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.info, self.preprocessing = bundle.info.model, bundle.info.preprocessing
        self.mask_ratio = bundle.info.default_mask_ratio

    def features(self, images: np.ndarray, output: Output) -> np.ndarray:
        try:
            return self.bundle.embed(images, [output])[output]
        except CapabilityError as error:
            raise UserError(str(error)) from None

    def check_reconstructor(self) -> None:
        try:
            self.bundle.check_capability("reconstruct")
        except CapabilityError as error:
            raise UserError(str(error)) from None

    def reconstruct(self, images: np.ndarray, visible: np.ndarray, masked: np.ndarray) -> np.ndarray:
        try:
            return self.bundle.reconstruct(images, visible, masked)
        except CapabilityError as error:
            raise UserError(str(error)) from None


class TorchRunner:
    """The graphs that `export` writes, from trained weights and the target of their decoder."""

    def __init__(self, trained: Trained, target: AnyTarget | None, device: torch.device) -> None:
        architecture = trained.architecture
        self.info = ModelInfo(
            name=trained.origin["name"],
            width=architecture.width,
            num_heads=architecture.num_heads,
            patch_size=architecture.patch_size,
            grid=architecture.grid,
            target=target.kind if target else None,
        )
        self.preprocessing = preprocessing_of(trained)
        self.mask_ratio = trained.origin.get("mask_ratio")
        self.device = device
        self.has_decoder = trained.cae is not None
        self.encoder = EncoderGraph(trained.encoder, trained.normalization).eval().to(device)
        self.reconstructor: ReconstructorGraph | None = None
        if trained.cae is not None and target is not None:
            self.reconstructor = ReconstructorGraph(trained.cae, trained.normalization, target).eval().to(device)

    @torch.inference_mode()
    def features(self, images: np.ndarray, output: Output) -> np.ndarray:
        if output not in self.encoder.outputs:
            raise UserError(
                f"{self.info.name}: the encoder has no {output}; it gives {', '.join(self.encoder.outputs)}"
            )
        with full_float32(self.device):
            return self.encoder.features(torch.from_numpy(images).to(self.device))[output].cpu().numpy()

    def check_reconstructor(self) -> None:
        if self.reconstructor is None:
            missing = (
                "the target that its decoder predicts was not found; name its file: load(..., target=FILE)"
                if self.has_decoder
                else "an encoder without a decoder; load a whole CAE, such as models/pretrain"
            )
            raise UserError(f"{self.info.name}: there is nothing to reconstruct with: {missing}")

    @torch.inference_mode()
    def reconstruct(self, images: np.ndarray, visible: np.ndarray, masked: np.ndarray) -> np.ndarray:
        assert self.reconstructor is not None  # as `check_reconstructor` tells
        inputs = (torch.from_numpy(array).to(self.device) for array in (images, visible, masked))
        with full_float32(self.device):
            return self.reconstructor(*inputs)[0].cpu().numpy()
