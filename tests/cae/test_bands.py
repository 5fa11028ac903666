"""Images of neither 1 nor 3 channels in training: one picture a channel, treated like the colours of one picture."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cae.config import CropConfig, FinetuneConfig
from cae.data.shards import ImageShards, Index, Row, ShardWriter, decode_stored
from cae.data.transforms import CropFlip, FinetuneTransform, to_array
from cae.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 12, 16), dtype=np.uint8)


def stored() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return buffer.getvalue()


def test_a_shard_gives_back_every_channel(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 1)
    writer.add(Row("a", 0, stored()))
    sums = {"mean": [0.5] * 5, "std": [0.2] * 5}
    Index(source="test", count={"train": 1}, classes=[], channels=5, shards=writer.close(), hash="0", **sums).write(
        tmp_path
    )
    image = ImageShards(tmp_path, "train").image(0)
    assert isinstance(image, tuple)
    assert np.array_equal(to_array(image), PIXELS)


def test_every_channel_is_cropped_and_flipped_like_the_colours_of_a_picture() -> None:
    five, picture = decode_stored(stored(), 5), Image.fromarray(np.ascontiguousarray(PIXELS[:3].transpose(1, 2, 0)))
    crop = CropFlip((6, 10), CropConfig(crop_scale=(0.3, 1.0), flip=0.5))
    flipped = set()
    for seed in range(20):
        got = to_array(crop(five, np.random.default_rng(seed)))
        assert got.shape == (5, 6, 10)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert np.array_equal(got[:3], to_array(crop(picture, np.random.default_rng(seed))))
        plain = CropFlip((6, 10), CropConfig(crop_scale=(0.3, 1.0), flip=0.0))
        flipped.add(np.array_equal(got, to_array(plain(five, np.random.default_rng(seed)))))
    assert flipped == {True, False}


def test_fine_tuning_does_without_rand_augment(raw_params: dict[str, Any]) -> None:
    config = FinetuneConfig(**raw_params["finetune"] | {"crop_scale": (0.5, 1.0)})
    transform = FinetuneTransform((8, 8), config, [0.5] * 5)
    assert transform(decode_stored(stored(), 5), np.random.default_rng(0))["images"].shape == (5, 8, 8)
    augmented = config.model_copy(update={"rand_augment": "rand-m9"})
    with pytest.raises(UserError, match=r"finetune\.rand_augment: rand-m9 .* these have 5 channels; set it to null"):
        FinetuneTransform((8, 8), augmented, [0.5] * 5)
