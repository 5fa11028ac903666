"""`cae-pipe profile` as it is called: what it prints, what it writes, and that it loses nobody's params.yaml."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cae.config import load_params
from pipeline import profiles
from tests.tiny import ROOT

PARAMS = ROOT / "params"


@dataclass(frozen=True)
class Checkout:
    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True)

    def cli(self, *arguments: str, code: int = 0) -> str:
        """Output of `cae-pipe profile`, which must end with this code."""
        command = [str(Path(sys.executable).parent / "cae-pipe"), "profile", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"}
        done = subprocess.run(
            command, cwd=self.root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, done.stdout
        return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    shutil.copytree(PARAMS, tmp_path / "params")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    made = Checkout(tmp_path)
    made.git("init", "--quiet")
    made.git("add", ".")
    made.git("commit", "--quiet", "--message", "start")
    return made


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_list_shows_every_profile_on_a_line_with_its_numbers(checkout: Checkout) -> None:
    lines = checkout.cli("list").splitlines()
    for name in profiles.names(PARAMS):
        params = profiles.read(PARAMS, name).params
        (line,) = [line for line in lines if f" {name} " in line]
        for shown in (params.model.name, params.pretrain.epochs, params.pretrain.batch_size, params.prepare.source):
            assert f" {shown} " in line


def test_show_prints_a_whole_parameter_file(checkout: Checkout, tmp_path: Path) -> None:
    shown = checkout.cli("show", "vit-l-1600", "--set", "prepare.source=folder:/data/imagenet")
    (tmp_path / "shown.yaml").write_text(shown)
    params = load_params(tmp_path / "shown.yaml")
    assert (params.pretrain.epochs, params.prepare.source) == (1600, "folder:/data/imagenet")
    assert checkout.params.read_text() == (ROOT / "params.yaml").read_text()


def test_apply_writes_the_merged_values_with_the_comments_of_the_base(checkout: Checkout) -> None:
    said = checkout.cli("apply", "vit-l-300", "--set", "pretrain.crop_scale=[0.2, 1.0]")
    expected = profiles.read(PARAMS, "vit-l-300", ["pretrain.crop_scale=[0.2, 1.0]"])
    assert load_params(checkout.params) == expected.params
    assert expected.params.pretrain.crop_scale == (0.2, 1.0)
    text = checkout.params.read_text()
    assert line_of(text, "epochs: 300").endswith("# 300, 800 or 1600")
    assert line_of(text, "drop_path: 0.2").endswith("# paper silent: the official code's for ViT-L")
    base = (PARAMS / "imagenet.yaml").read_text()
    assert [line.split(":")[0] for line in text.splitlines()[2:]] == [
        line.split(":")[0] for line in base.splitlines()[1:]
    ]
    before, after = load_params(ROOT / "params.yaml"), expected.params
    assert f"  pretrain.epochs: {before.pretrain.epochs} → {after.pretrain.epochs}\n" in said
    assert "  pretrain.crop_scale: [0.6, 1.0] → [0.2, 1.0]\n" in said
    assert "export.opset" not in said
    assert "data/imagenet is not there yet" in said
    assert said.endswith("next: make repro\n")


def test_apply_refuses_to_lose_changes_unless_forced(checkout: Checkout) -> None:
    mine = checkout.params.read_text().replace("seed: 0 ", "seed: 5 ")
    checkout.params.write_text(mine)
    said = checkout.cli("apply", "cifar10", code=2)
    assert "params.yaml: holds changes that would be lost" in said
    assert "--force" in said
    assert checkout.params.read_text() == mine
    assert "seed: 5 → 0" in checkout.cli("apply", "cifar10", "--force")
    assert load_params(checkout.params) == profiles.read(PARAMS, "cifar10").params


def test_apply_needs_no_force_for_what_is_committed_or_just_a_profile(checkout: Checkout) -> None:
    checkout.cli("apply", "cifar10", "--set", "seed=5")
    checkout.git("commit", "--quiet", "--all", "--message", "my own")
    checkout.cli("apply", "vit-b-300")
    checkout.cli("apply", "default")
    assert checkout.params.read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("ignored", [False, True])
def test_what_git_does_not_keep_is_not_overwritten(checkout: Checkout, ignored: bool) -> None:
    if ignored:
        (checkout.root / ".gitignore").write_text("params.yaml\n")
        checkout.git("rm", "--quiet", "--cached", "params.yaml")
        checkout.git("commit", "--quiet", "--message", "untracked")
    else:
        shutil.rmtree(checkout.root / ".git")
    # Just what the default profile gives, so nothing is lost.
    checkout.cli("apply", "cifar10")
    checkout.params.write_text(checkout.params.read_text() + "# a note of mine\n")
    assert "would be lost" in checkout.cli("apply", "default", code=2)


def test_apply_works_where_there_is_no_parameter_file_or_a_broken_profile(checkout: Checkout) -> None:
    checkout.params.unlink()
    (checkout.root / "params/mine.yaml").write_text("extends: default.yaml\nsead: 3\n")
    checkout.cli("apply", "cifar10")
    checkout.cli("apply", "default")
    assert load_params(checkout.params).prepare.source == "mnist5k"


def test_an_unknown_name_or_a_wrong_place_ends_with_code_2(checkout: Checkout) -> None:
    assert "did you mean `vit-b-300`?" in checkout.cli("apply", "vitb300", code=2)
    shutil.rmtree(checkout.root / "params")
    assert "run in the root of a checkout" in checkout.cli("list", code=2)
