"""Prepared data: shards, the order of batches, and transforms that depend on (seed, epoch, position) alone."""

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cae.config import CropConfig, FinetuneConfig
from cae.data.loader import (
    EvalDataset,
    TrainDataset,
    eval_loader,
    train_loader,
)
from cae.data.order import EpochBatches, SampleId, SampleOrder
from cae.data.shards import UNLABELLED, ImageShards, Index, Row, ShardInfo, ShardWriter, Split
from cae.data.transforms import (
    CropFlip,
    CropTransform,
    FinetuneTransform,
    PretrainTransform,
    random_crop_box,
    seeded,
    to_array,
)
from cae.errors import UserError
from cae.masking import MaskSampler

CPU = torch.device("cpu")
NUM_IMAGES = 23
SIZE_PX = (12, 16)


def pixels_of(number: int, channels: int = 3) -> np.ndarray:
    """Smooth, all different, so that crops and flips show; height, width, channels."""
    y, x = np.mgrid[: SIZE_PX[0], : SIZE_PX[1]]
    planes = [(10 * x + 3 * y * (c + 1) + 7 * number) % 256 for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder: Path, split: Split, numbers: range, shard_mb: float) -> list[ShardInfo]:
    writer = ShardWriter(folder, split, shard_mb)
    for number in numbers:
        writer.add(Row(f"image/{number:02d}", number % 5 if number != 3 else UNLABELLED, encoded(number)))
    return writer.close()


def write_folder(folder: Path, channels: int = 3, shard_mb: float = 0.0004) -> Path:
    """NUM_IMAGES training and four validation images as prepared data."""
    folder.mkdir(exist_ok=True)
    shards = write_split(folder, "train", range(NUM_IMAGES), shard_mb)
    shards += write_split(folder, "val", range(100, 104), shard_mb)
    Index(
        source="test",
        count={"train": NUM_IMAGES, "val": 4},
        classes=list("abcde"),
        channels=channels,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        shards=shards,
        hash="0",
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("prepared") / "data")


def test_shards_give_back_every_row_in_any_order(prepared: Path) -> None:
    shards = ImageShards(prepared, "train")
    assert len(shards.infos) > 3
    assert len(shards) == NUM_IMAGES
    for position in np.random.default_rng(0).permutation(NUM_IMAGES).tolist():
        assert shards.key(position) == f"image/{position:02d}"
        assert shards.label(position) == (position % 5 if position != 3 else UNLABELLED)
        assert np.array_equal(np.asarray(shards.image(position)), pixels_of(position))
    labels = np.concatenate(list(shards.labels()))
    assert labels.tolist() == [shards.label(i) for i in range(NUM_IMAGES)]


def test_only_so_many_shards_are_open_at_a_time(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_maps() -> int:
        return sum(str(prepared) in line for line in Path("/proc/self/maps").read_text().splitlines())

    monkeypatch.setattr("cae.data.shards.MAX_OPEN", 2)
    before = num_maps()
    shards = ImageShards(prepared, "train")
    for position in [*range(NUM_IMAGES), *reversed(range(NUM_IMAGES))]:
        assert shards.key(position) == f"image/{position:02d}"
        assert num_maps() - before <= 2


def test_splits_are_kept_apart(prepared: Path) -> None:
    val = ImageShards(prepared, "val")
    assert [val.key(i) for i in range(len(val))] == [f"image/{n}" for n in range(100, 104)]


def test_images_have_the_channels_of_the_index(tmp_path: Path, prepared: Path) -> None:
    grey = ImageShards(write_folder(tmp_path / "grey", channels=1), "train")
    assert grey.image(0).mode == "L"
    assert ImageShards(prepared, "train").image(0).mode == "RGB"


def test_the_index_describes_the_files_that_were_written(prepared: Path) -> None:
    index = Index.read(prepared)
    assert sum(shard.count for shard in index.shards) == NUM_IMAGES + 4
    assert len({shard.sha256 for shard in index.shards}) == len(index.shards)
    for shard in index.shards:
        assert (prepared / shard.file).stat().st_size == shard.bytes


def test_the_same_rows_make_the_same_bytes(tmp_path: Path, prepared: Path) -> None:
    again = write_folder(tmp_path / "again")
    assert [s.sha256 for s in Index.read(again).shards] == [s.sha256 for s in Index.read(prepared).shards]
    assert (again / "index.json").read_bytes() == (prepared / "index.json").read_bytes()


def test_the_size_of_a_shard_is_up_to_the_caller(tmp_path: Path) -> None:
    assert len(write_split(tmp_path, "train", range(10), shard_mb=1)) == 1
    assert len(write_split(tmp_path, "train", range(10), shard_mb=1e-6)) == 10
    assert ShardWriter(tmp_path, "val", 1).close() == []
    writer = ShardWriter(tmp_path, "train", shard_mb=0.0003)
    for number in range(10):
        writer.add(Row(str(number), 0, bytes(100)))
    assert [shard.count for shard in writer.close()] == [3, 3, 3, 1]


def test_opened_shards_travel_to_workers_without_their_images(prepared: Path) -> None:
    shards = ImageShards(prepared, "train")
    fresh = len(pickle.dumps(shards))
    for position in range(NUM_IMAGES):
        shards.image(position)
    sent = pickle.dumps(shards)
    assert len(sent) == fresh
    copy = pickle.loads(sent)
    assert np.array_equal(np.asarray(copy.image(7)), pixels_of(7))


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/index\.json: no prepared data; run `dvc repro prepare`"):
        ImageShards(tmp_path, "train")


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    shards = ImageShards(write_folder(tmp_path / "data"), "train")
    path = tmp_path / "data" / shards.infos[1].file
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"x" * 500, "truncated": whole[: len(whole) // 2]}[damage])
    shards.image(0)
    with pytest.raises(UserError, match=rf"{path.name}: cannot be read as a shard .*dvc repro --force prepare"):
        shards.image(shards.infos[0].count)


CROP = CropConfig(crop_scale=(0.3, 1.0), flip=0.5)
PRETRAIN = PretrainTransform(CropFlip((8, 8), CROP), MaskSampler((4, 4), 8, "block", 0.1))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_target_s_view_is_the_same_crop_and_flip_of_the_original(flip: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    config = CropConfig(crop_scale=(0.2, 0.5), flip=flip)
    one, two = (PretrainTransform(CropFlip((16, 24), config), PRETRAIN.masks, target_px=px) for px in (None, (8, 12)))
    for seed in range(5):
        alone, both = (transform(image, np.random.default_rng(seed)) for transform in (one, two))
        assert alone.keys() == both.keys() - {"target_images"}
        assert all(np.array_equal(alone[key], both[key]) for key in alone), "a second view changes nothing else"
        rng = np.random.default_rng(seed)
        two.masks(rng)
        box = random_crop_box(rng, image.size, config.crop_scale, 24 / 16)
        expected = image.resize((12, 8), Image.Resampling.BICUBIC, box=box)
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(both["target_images"], to_array(expected))


def all_batches(prepared: Path, seed: int = 0, num_workers: int = 0) -> list[dict[str, torch.Tensor]]:
    dataset = TrainDataset(ImageShards(prepared, "train"), PRETRAIN, seed)
    return list(
        train_loader(dataset, EpochBatches(SampleOrder(dataset.shards.counts, seed), 8, 0, 4), num_workers, CPU)
    )


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def test_the_number_of_workers_changes_nothing(prepared: Path) -> None:
    alone, shared = all_batches(prepared, num_workers=0), all_batches(prepared, num_workers=2)
    assert same(alone, shared)
    batch = alone[0]
    assert (batch["images"].shape, batch["images"].dtype) == ((8, 3, 8, 8), torch.uint8)
    assert (batch["visible"].shape, batch["masked"].shape) == ((8, 8), (8, 8))
    for name in ("visible", "masked", "labels", "positions"):
        assert batch[name].dtype == torch.int64, name
    shards = ImageShards(prepared, "train")
    for position, label in zip(batch["positions"].tolist(), batch["labels"].tolist(), strict=True):
        assert shards.label(position) == label


def test_the_loader_leaves_the_global_generator_alone(prepared: Path) -> None:
    before = torch.get_rng_state()
    all_batches(prepared)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_depends_on_seed_epoch_and_position_and_on_nothing_else(prepared: Path) -> None:
    shards = ImageShards(prepared, "train")

    def sample(seed: int, epoch: int, position: int) -> dict[str, Any]:
        return TrainDataset(shards, PRETRAIN, seed)[SampleId(epoch, position)]

    first = sample(0, 1, 2)
    np.random.seed(9)
    random.seed(9)
    torch.manual_seed(9)
    again = sample(0, 1, 2)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    for other in (sample(1, 1, 2), sample(0, 2, 2)):
        assert not np.array_equal(first["images"], other["images"])
        assert not np.array_equal(first["masked"], other["masked"])
    # Another image of the same epoch has another mask, too.
    assert not np.array_equal(first["masked"], sample(0, 1, 4)["masked"])
    assert first["labels"] == 2


def test_evaluation_takes_every_image_once_in_order(prepared: Path) -> None:
    shards = ImageShards(prepared, "train")
    batches = list(eval_loader(EvalDataset(shards, to_array), 10, 0, CPU))
    assert [len(batch["images"]) for batch in batches] == [10, 10, 3]
    images = torch.cat([batch["images"] for batch in batches])
    for position in range(NUM_IMAGES):
        assert np.array_equal(images[position].permute(1, 2, 0).numpy(), pixels_of(position))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [shards.label(i) for i in range(NUM_IMAGES)]


def test_evaluation_gives_the_target_its_own_view_where_it_wants_one(prepared: Path) -> None:
    def halved(image: Image.Image) -> np.ndarray:
        return to_array(image.resize((8, 6)))

    shards = ImageShards(prepared, "train")
    assert "target_images" not in EvalDataset(shards, to_array)[3]
    item = EvalDataset(shards, to_array, halved)[3]
    assert np.array_equal(item["target_images"], halved(shards.image(3)))
    assert np.array_equal(item["images"], to_array(shards.image(3)))


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
)
def test_a_crop_stays_inside_the_image(seed: int, size: tuple[int, int], scale: tuple[float, float]) -> None:
    left, top, right, bottom = random_crop_box(np.random.default_rng(seed), size, scale)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]


def test_a_crop_keeps_area_and_aspect_within_their_ranges() -> None:
    shares, aspects, corners = [], [], set()
    for seed in range(500):
        left, top, right, bottom = random_crop_box(np.random.default_rng(seed), (400, 300), (0.2, 0.6))
        shares.append((right - left) * (bottom - top) / 120_000)
        aspects.append((right - left) / (bottom - top))
        corners.add((left, top))
    assert 0.195 < min(shares) < 0.22
    assert 0.58 < max(shares) < 0.605
    assert np.mean(shares) == pytest.approx(0.4, abs=0.02)
    assert 0.74 < min(aspects) < 0.77
    assert 1.3 < max(aspects) < 1.35
    assert np.median(aspects) == pytest.approx(1, abs=0.05)
    assert len(corners) > 450


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 30), (480, 0, 520, 30)),
        ((30, 1000), (0, 480, 30, 520)),
        ((1, 500), (0, 249, 1, 250)),
        ((500, 1), (249, 0, 250, 1)),
    ],
)
def test_where_no_crop_fits_the_middle_is_taken(size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert random_crop_box(np.random.default_rng(0), size, (1.0, 1.0)) == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_crop_of_a_fitting_image_is_the_image(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    crop = CropFlip((28, 28), CropConfig(crop_scale=(1.0, 1.0), flip=0.0))
    for seed in range(50):
        assert np.array_equal(np.asarray(crop(image, np.random.default_rng(seed))), np.asarray(image))


def test_a_flip_is_a_mirror_image_left_to_right_as_often_as_asked() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    sides = {False: 0, True: 0}
    for seed in range(400):
        crop = CropFlip((8, 8), CropConfig(crop_scale=(1.0, 1.0), flip=0.25))
        result = np.asarray(crop(image, np.random.default_rng(seed)))
        mirrored = np.array_equal(result, np.asarray(image)[:, ::-1])
        assert mirrored or np.array_equal(result, np.asarray(image))
        sides[mirrored] += 1
    # 400 draws with probability 1/4: five standard deviations are 43.
    assert abs(sides[True] - 100) < 43


def test_a_crop_has_the_size_asked_for_height_first() -> None:
    image = Image.fromarray(pixels_of(0))
    assert CropTransform(CropFlip((6, 10), CROP))(image, np.random.default_rng(0))["images"].shape == (3, 6, 10)


def test_a_crop_shows_the_part_of_the_image_that_was_drawn() -> None:
    # Grey tells the column, so the crop's range of grey tells which columns it took.
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    rng_seed, scale = 4, (0.1, 0.2)
    left, _, right, _ = random_crop_box(np.random.default_rng(rng_seed), (200, 200), scale)
    crop = CropFlip((32, 32), CropConfig(crop_scale=scale, flip=0.0))
    shown = np.asarray(crop(image, np.random.default_rng(rng_seed)))
    assert int(shown.min()) == pytest.approx(left, abs=3)
    assert int(shown.max()) == pytest.approx(right, abs=3)


def test_arrays_are_channels_first_contiguous_and_writable() -> None:
    array = to_array(Image.fromarray(pixels_of(1)))
    assert np.array_equal(array, pixels_of(1).transpose(2, 0, 1))
    assert array.flags.c_contiguous
    assert array.flags.writeable
    grey = to_array(Image.fromarray(pixels_of(1)[..., 0]))
    assert grey.shape == (1, *SIZE_PX)
    assert grey.flags.writeable


def global_draws() -> tuple[float, float, float]:
    return random.random(), np.random.random(), torch.rand(1).item()


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_restores_all_three_generators(fails: bool) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    global_draws()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    try:
        with seeded(5):
            inside = global_draws()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    with seeded(5):
        assert global_draws() == inside
    with seeded(6):
        assert all(a != b for a, b in zip(global_draws(), inside, strict=True))


@pytest.fixture
def make_finetune(raw_params: dict[str, Any]) -> Callable[..., FinetuneTransform]:
    def make(rand_augment: str | None, channels: int = 3) -> FinetuneTransform:
        raw = raw_params["finetune"] | {"rand_augment": rand_augment, "crop_scale": (0.5, 1.0), "flip": 0.5}
        return FinetuneTransform((32, 24), FinetuneConfig(**raw), [0.3, 0.4, 0.5][:channels])

    return make


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rand_augment_depends_on_the_samples_generator_alone(
    make_finetune: Callable[..., FinetuneTransform], mode: str
) -> None:
    image = Image.fromarray(pixels_of(2)).resize((64, 48)).convert(mode)
    channels = len(image.getbands())
    augmented, plain = make_finetune("rand-m9-mstd0.5-inc1", channels), make_finetune(None, channels)
    changed = 0
    for seed in range(30):
        random.seed(seed)
        np.random.seed(seed)
        first = augmented(image, np.random.default_rng(seed))["images"]
        random.seed(77)
        np.random.seed(77)
        assert np.array_equal(augmented(image, np.random.default_rng(seed))["images"], first)
        assert (first.shape, first.dtype) == ((channels, 32, 24), np.uint8)
        changed += not np.array_equal(plain(image, np.random.default_rng(seed))["images"], first)
    assert changed > 15


def test_the_index_is_plain_json(prepared: Path) -> None:
    content = json.loads((prepared / "index.json").read_text())
    assert content["count"] == {"train": NUM_IMAGES, "val": 4}
    assert content["shards"][0].keys() == {"file", "split", "count", "bytes", "sha256"}
