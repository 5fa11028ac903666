"""`cae-pipe plan`: the figures are those of the design, of real steps and of real files, and hours follow from them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cae.config import Params, parse_params
from cae.data.shards import Index
from cae.errors import UserError
from cae.model import ContextAutoencoder, Encoder
from cae.normalization import Normalization
from cae.train.checkpoint import CheckpointStore
from cae.train.optimizer import adamw
from pipeline import costs, plan, profiles, tokenizer
from pipeline.batches import draw_masks
from pipeline.plan import Machine
from pipeline.plan_command import PeakName
from pipeline.pretrain import Objective, mask_sampler
from pipeline.workspace import Workspace
from tests.pipeline.command import cae_pipe
from tests.tiny import ROOT, TINY, shipped_params, with_values

HERE = Workspace(ROOT, ROOT / "params.yaml")

# Forward GMAC of ViT-B/16 at 224 px, 98 of 196 patches masked, as counted when the project was designed.
DESIGN_GMAC = {"encoder": 8.70, "alignment": 8.70, "regressor": 3.35, "decoder": 2.83, "head": 0.62}
DALLE_GMAC = 26.06  # at 112 px
DESIGN_STEP_GMAC = {"tokens_given": 55.2, "pixels": 53.6, "dalle": 81.3}
BEIT_STEP_GMAC, MAE_STEP_GMAC = 54.1, 29.3


def paper(size: str, **changes: object) -> Params:
    named = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return profiles.read(ROOT / "params", f"vit-{size}-1600", named).params


def machine(**options: Any) -> Machine:
    blank = {"devices": 1, "device": None, "device_tflops": None, "utilization": None, "images_per_s": None}
    return Machine.parse(**{**blank, **options})


@pytest.fixture(scope="module")
def vit_b() -> costs.Arithmetic:
    return costs.count_arithmetic(paper("b"), channels=3)


@pytest.fixture(scope="module")
def small() -> Params:
    return parse_params(with_values(shipped_params(), TINY))


@pytest.mark.parametrize("name", DESIGN_GMAC)
def test_each_part_of_vit_b_costs_what_the_design_counted(name: str, vit_b: costs.Arithmetic) -> None:
    (part,) = [part for part in vit_b.parts if part.name == name]
    assert part.macs / 1e9 == pytest.approx(DESIGN_GMAC[name], rel=0.02)


@pytest.mark.parametrize("target", DESIGN_STEP_GMAC)
def test_a_step_of_vit_b_costs_what_the_design_counted(target: str, vit_b: costs.Arithmetic) -> None:
    assert vit_b.other_targets[target] / 1e9 == pytest.approx(DESIGN_STEP_GMAC[target], rel=0.02)


def test_the_rows_of_other_methods_follow_from_our_blocks(vit_b: costs.Arithmetic) -> None:
    # BEiT: all patches through the encoder, a head of 8192 on 75 of them.
    beit = 3 * (vit_b.encoder_all_patches + 75 * 768 * 8192)
    assert beit / 1e9 == pytest.approx(BEIT_STEP_GMAC, rel=0.02)
    # MAE: a quarter through the encoder, then 8 × 512 on all patches, between two linear layers.
    encoder = costs.count_arithmetic(paper("b", pretrain__mask__ratio=0.75), channels=3).parts[0]
    with torch.device("meta"):
        sizes = paper("b", model__depth=8, model__width=512, model__num_heads=16).architecture(3, 1)
        decoder = Encoder(sizes)
        embedded = torch.empty(1, 196, 512)
    with FlopCounterMode(display=False) as counter:
        decoder.encode(embedded)
    mae = 3 * (encoder.macs + counter.get_total_flops() / 2 + 50 * 768 * 512 + 197 * 512 * 768)
    assert mae / 1e9 == pytest.approx(MAE_STEP_GMAC, rel=0.02)
    rows = {row.method: row for row in plan.table_10(plan.make(HERE, ["vit-b-1600"], machine(), 64, None)[0])}
    assert rows["BEiT"].step_macs - costs.dalle_macs((14, 14)) == BEIT_STEP_GMAC * 1e9
    assert costs.dalle_macs((14, 14)) == pytest.approx(DALLE_GMAC * 1e9, rel=0.001)
    assert rows["MAE"].step_macs == MAE_STEP_GMAC * 1e9


def test_the_products_of_attention_are_counted(vit_b: costs.Arithmetic) -> None:
    depth, width, tokens = 12, 768, 197
    linear = depth * 12 * width**2 * tokens + 196 * 768 * width  # q, k, v, out, and the MLP; the patches
    assert vit_b.encoder_all_patches == linear + depth * 2 * tokens**2 * width


@pytest.mark.parametrize("kind", ["dvae", "pixels"])
def test_the_parts_are_the_whole_step_forward_and_backward(kind: str) -> None:
    params = paper("l", tokenizer__kind=kind)  # with a projection
    arithmetic = costs.count_arithmetic(params, channels=3)
    objective, batch = costs._objective(params, 3), costs._batch(params, 3, 1, "meta")
    images = batch["images"].float()
    with FlopCounterMode(display=False) as counter:
        objective.target.encode(images)
        output = objective.model(images, batch["visible"], batch["masked"])
        forward = counter.get_total_flops() // 2
        output.prediction.sum().backward()
    assert sum(part.macs for part in arithmetic.parts) == forward
    # The images need no gradient, so the embedding has one product less.
    assert arithmetic.step == pytest.approx(counter.get_total_flops() / 2, rel=0.005)


def test_parameters_are_those_of_the_built_model() -> None:
    counts = costs.count_parameters(paper("l"), channels=3)
    parts = ("encoder", "projection", "regressor", "decoder", "head")
    assert sum(counts[part] for part in parts) == counts["trained"]
    assert counts["encoder"] / 1e6 == pytest.approx(303.1, abs=0.1)


def real_objective(params: Params) -> Objective:
    normalization = Normalization([0.5], [0.25])
    target = tokenizer.build(params, normalization).eval()
    model = ContextAutoencoder(params.architecture(1, target.num_outputs), params.pretrain.drop_path)
    return Objective(model, target, normalization, params.pretrain.alignment_weight, 0)


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_a_real_step_keeps(bf16: bool, small: Params) -> None:
    objective, kept = real_objective(small), {}
    visible, masked = draw_masks(mask_sampler(small), 0, range(6))
    batch = {"images": torch.zeros(6, 1, 28, 28, dtype=torch.uint8), "visible": visible, "masked": masked}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        objective(batch, 0)
    modules = (objective.model, objective.target, objective.normalize)
    for value in (value for module in modules for value in (*module.parameters(), *module.buffers())):
        kept.pop(value.untyped_storage().data_ptr(), None)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    memory = costs.count_memory(small, channels=1, batch_size=6)
    assert memory.activations["bf16" if bf16 else "fp32"] == pytest.approx(real, rel=0.001)


def test_a_checkpoint_is_as_large_as_said(tmp_path: Path) -> None:
    params = parse_params(shipped_params())
    model = real_objective(params).model
    optimizer = adamw(model, params.pretrain)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    store = CheckpointStore(tmp_path, 1, None)
    path = store.save(1, {"module": model.state_dict(), "optimizer": optimizer.state_dict()})
    said = costs.count_memory(params, channels=1, batch_size=1).checkpoint
    assert path.stat().st_size == pytest.approx(said, rel=0.02)


def test_memory_grows_with_the_images_of_a_device_and_with_nothing_else(small: Params) -> None:
    one, two = (costs.count_memory(small, channels=1, batch_size=size) for size in (32, 64))
    for precision in ("fp32", "bf16"):
        # Not quite twice: the casts of the weights are kept once.
        assert 1.5 < two.activations[precision] / one.activations[precision] <= 2
        assert two.total(precision) > one.total(precision)
    assert two.tokenizer == pytest.approx(2 * one.tokenizer, rel=0.01)
    assert two[:3] == one[:3]
    assert two.activations["bf16"] < two.activations["fp32"]


def test_a_tokenizer_that_needs_more_than_the_step_decides_the_memory() -> None:
    memory = costs.count_memory(paper("s"), channels=3, batch_size=64)
    resident = memory.weights + memory.gradients + memory.moments
    # Two values of the first convolution, before and after the ReLU, at full size.
    assert memory.tokenizer == pytest.approx(2 * 64 * 256 * 224 * 224 * 4, rel=0.01)
    assert memory.total("bf16") == resident + memory.tokenizer > resident + memory.activations["bf16"]


def test_hours_at_the_papers_rate_are_the_papers() -> None:
    (made,) = plan.make(HERE, ["vit-b-1600"], machine(devices=32, device="a100", images_per_s=163.09), None, None)
    assert made.is_table_10
    assert made.batch_per_device == 64
    assert made.hours == pytest.approx(109, abs=0.15)
    assert made.speed
    assert made.speed.utilization == pytest.approx(163.09 * 2 * made.arithmetic.step / 312e12)
    cae = plan.table_10(made)[-1]
    assert cae.images_per_s == pytest.approx(163, abs=0.5)
    assert cae.utilization == pytest.approx(0.085, abs=0.0005)
    assert cae.hours_at(cae.utilization) == pytest.approx(109)


def test_hours_follow_peak_utilization_devices_images_and_epochs() -> None:
    def hours(images: int = 6_400, **options: Any) -> float:
        given = {"device_tflops": 1.0, "utilization": 0.5, **options}
        (made,) = plan.make(HERE, ["default"], machine(**given), 64, images)
        assert made.hours is not None
        return made.hours

    params = profiles.read(ROOT / "params", "default").params
    step, epochs = costs.count_arithmetic(params, channels=1).step, params.pretrain.epochs
    assert hours() == pytest.approx(epochs * 6_400 * 2 * step / (0.5 * 1e12) / 3600)
    assert hours(devices=8) == pytest.approx(hours() / 8)
    assert hours(utilization=0.25) == pytest.approx(2 * hours())
    # Every image counts in every epoch, up to the last step's full batch.
    batch_size = params.pretrain.batch_size
    steps = -(-epochs * (2 * 6_400 + 63) // batch_size)
    assert hours(images=2 * 6_400 + 63) == pytest.approx(hours() * steps * batch_size / (epochs * 6_400))


def test_without_a_device_there_are_no_hours_and_the_assumption_is_named_as_one() -> None:
    (made,) = plan.make(HERE, ["vit-s-300"], machine(), 64, None)
    assert (made.speed, made.hours, made.num_images) == (None, None, 1_281_167)
    speed = plan.speed_of(1e9, machine(device="h100-sxm"), None)
    assert speed == (pytest.approx(0.3 * 989e12 / 2e9), "assumed", 0.3)


def test_a_workspace_gives_its_own_rate_channels_and_images(tmp_path: Path) -> None:
    (tmp_path / "params").symlink_to(ROOT / "params")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    workspace = Workspace(tmp_path, tmp_path / "params.yaml")
    workspace.write_metrics("pretrain", {}, {"images_per_s": 100.0})
    (made,) = plan.make(workspace, [], machine(), None, None)
    assert (made.channels, made.num_images, made.speed) == (1, 4_000, (100.0, "measured", None))
    # The rate is that of params.yaml, so it says nothing of another profile.
    assert plan.make(workspace, ["default"], machine(), None, None)[0].speed is None

    workspace.prepared.mkdir(parents=True)
    count = {"train": 6_400, "val": 1}
    index = Index(source="mnist5k", count=count, classes=[], channels=3, mean=[0.5], std=[0.5], shards=[], hash="")
    index.write(workspace.prepared)
    (made,) = plan.make(workspace, [], machine(), None, None)
    assert (made.channels, made.num_images) == (3, 6_400)
    assert made.hours == pytest.approx(16 * 6_400 / 100 / 3600)
    # Prepared data of another source say nothing of this one.
    assert plan.make(workspace, ["vit-s-300"], machine(), 64, None)[0].num_images == 1_281_167


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utilization": 0.5}, "--utilization is a share of a peak; add --device"),
        ({"utilization": 1.5, "device": "a100"}, "--utilization: 1.5 must be a share"),
        ({"utilization": 0.0, "device": "a100"}, "--utilization: 0.0 must be a number above 0"),
        ({"images_per_s": -1.0}, "--images-per-s: -1.0 must be a number above 0"),
        ({"device_tflops": float("nan")}, "--device-tflops: nan must be a number above 0"),
        ({"device_tflops": 5.0, "device": "a100"}, "--device a100 has a peak of its own"),
        ({"images_per_s": 9.0, "device": "a100", "utilization": 0.5}, "leave out --utilization"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        machine(**options)


def test_wrong_profiles_and_batches_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean `vit-b-300`"):
        plan.make(HERE, ["vit-b-3000"], machine(), None, None)
    with pytest.raises(UserError, match="3 devices cannot share a batch of 2 images"):
        plan.make(HERE, ["default"], machine(devices=3), 2, None)
    with pytest.raises(UserError, match="batch_size: 64 is more than the 50 training images"):
        plan.make(HERE, ["default"], machine(images_per_s=1.0), None, 50)


def test_the_command_knows_the_devices_of_the_plan() -> None:
    assert {name.value for name in PeakName} == set(plan.PEAK_TFLOPS)


def test_three_sizes_fit_a_narrow_terminal_beside_the_papers_table() -> None:
    arguments = [part for size in "sbl" for part in ("--profile", f"vit-{size}-1600")]
    done = cae_pipe("plan", *arguments, "--device", "a100", "--devices", "32", cwd=ROOT, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.stdout
    (encoder,) = [line for line in lines if line.startswith("│ encoder on visible")]
    assert [cell.strip() for cell in encoder.split("│")[2:-1]] == ["2.25", "8.70", "30.53"]
    assert "Assumed, not measured: 30% of the bf16 peak of 312 TFLOP/s" in " ".join(done.stdout.split())
    (cae,) = [line for line in lines if line.startswith("│ CAE")]
    assert [cell.strip() for cell in cae.split("│")[3:6]] == ["109", "163", "8.5%"]


def test_json_holds_the_same_figures() -> None:
    done = cae_pipe("plan", "--profile", "vit-b-300", "--images-per-s", "500", "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (made,) = document["plans"]
    assert made["num_macs"]["regressor"] == 3_354_968_064
    assert made["hours"] == pytest.approx(math.ceil(300 * 1_281_167 / 2048) * 2048 / 500 / 3600)
    memory = made["memory_bytes"]
    held = max(memory["activations_bf16"], memory["tokenizer"])
    assert memory["total_bf16"] == memory["weights"] + memory["gradients"] + memory["moments"] + held
    assert [row["method"] for row in document["table_10"]] == ["BEiT", "MAE", "CAE"]
    assert "utilization" in document["table_10"][0]
