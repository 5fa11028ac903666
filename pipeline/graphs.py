"""What is exported and what the report shows: from uint8 images to features and pictures, normalisation inside."""

from torch import Tensor, nn

from cae.model import AnyEncoder, ContextAutoencoder
from cae.normalization import Normalization, Normalize
from cae.targets import reconstruct
from cae.targets.files import AnyTarget
from pipeline.batches import unit_range


class EncoderGraph(nn.Module):
    """uint8 images to the outputs of encoder.onnx, normalisation inside; an encoder gives those that it has."""

    def __init__(self, encoder: AnyEncoder, normalization: Normalization) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = Normalize(normalization)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` gives, in order."""
        class_token = ("class_token",) if self.encoder.num_prefix else ()
        attention = ("class_attention",) if self.encoder.has_attention else ()
        return ("patches", *class_token, "pooled", *attention)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens, attention = self.encoder.forward_with_attention(self.normalize(unit_range(images)))
        prefix = self.encoder.num_prefix
        patches = tokens[:, prefix:]
        class_token = (tokens[:, 0],) if prefix else ()
        return (patches, *class_token, self.encoder.pool(patches), *(() if attention is None else (attention,)))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        return dict(zip(self.outputs, self(images), strict=True))


class ReconstructorGraph(nn.Module):
    """uint8 images and a mask to the whole reconstruction, and the decoder's output for the masked patches."""

    def __init__(self, cae: ContextAutoencoder, normalization: Normalization, target: AnyTarget) -> None:
        super().__init__()
        self.model, self.target = cae, target
        self.normalize = Normalize(normalization)

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        unit = unit_range(images)
        prediction = self.model.predict(self.normalize(unit), visible, masked)
        fill = self.normalize.mean.flatten()
        return reconstruct(
            self.target, unit, visible, masked, prediction, fill, self.target.architecture.patch_size
        ), prediction


class SkipReconstructorGraph(nn.Module):
    """uint8 images to their reconstruction without the regressor (Figure 3), and the decoder's output."""

    def __init__(self, cae: ContextAutoencoder, normalization: Normalization, target: AnyTarget) -> None:
        super().__init__()
        self.model, self.target = cae, target
        self.normalize = Normalize(normalization)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.model.predict_without_regressor(self.normalize(unit_range(images)))
        return self.target.decode(self.target.codes_from(prediction)).clamp(0, 1), prediction
