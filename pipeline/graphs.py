"""What is exported and what the report shows: from uint8 images to features and pictures, normalisation inside."""

from torch import Tensor, nn

from cae.model import Encoder
from cae.normalization import Normalization, Normalize
from cae.targets import reconstruct
from cae.targets.files import AnyTarget
from cae.weights import LoadedCae
from pipeline.batches import unit_range


class EncoderGraph(nn.Module):
    """uint8 images to the four outputs of encoder.onnx, normalisation inside."""

    def __init__(self, encoder: Encoder, normalization: Normalization) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = Normalize(normalization)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, attention = self.encoder.forward_with_attention(self.normalize(unit_range(images)))
        return tokens[:, 1:], tokens[:, 0], tokens[:, 1:].mean(dim=1), attention


class ReconstructorGraph(nn.Module):
    """uint8 images and a mask to the whole reconstruction, and the decoder's output for the masked patches."""

    def __init__(self, loaded: LoadedCae, target: AnyTarget) -> None:
        super().__init__()
        self.model, self.target = loaded.model, target
        self.normalize = Normalize(loaded.normalization)
        self.patch_size = loaded.architecture.patch_size

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        unit = unit_range(images)
        prediction = self.model.predict(self.normalize(unit), visible, masked)
        fill = self.normalize.mean.flatten()
        return reconstruct(self.target, unit, visible, masked, prediction, fill, self.patch_size), prediction


class SkipReconstructorGraph(nn.Module):
    """uint8 images to their reconstruction without the regressor (Figure 3), and the decoder's output."""

    def __init__(self, loaded: LoadedCae, target: AnyTarget) -> None:
        super().__init__()
        self.model, self.target = loaded.model, target
        self.normalize = Normalize(loaded.normalization)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.model.predict_without_regressor(self.normalize(unit_range(images)))
        return self.target.decode(self.target.codes_from(prediction)).clamp(0, 1), prediction
