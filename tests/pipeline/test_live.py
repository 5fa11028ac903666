"""Curves are drawn by DVCLive, and a training does without them where it is not installed."""

import logging
import shutil
import sys
from pathlib import Path

import pytest

from cae.train.loop import RunFolder
from pipeline import report, sections
from pipeline.live import curves
from pipeline.workspace import Workspace


def test_rows_become_curves(tmp_path: Path) -> None:
    with curves(RunFolder(tmp_path / "run", 1, {}), tmp_path / "published", tensorboard=False) as sink:
        assert sink
        sink(1, {"loss": 2.5})
        sink(2, {"loss": 1.5})
    lines = (tmp_path / "published/loss.tsv").read_text().splitlines()
    assert [line.split() for line in lines] == [["step", "loss"], ["1", "2.5"], ["2", "1.5"]]


def test_without_dvclive_there_are_none_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "dvclive", None)
    (tmp_path / "run").mkdir()
    with (
        caplog.at_level(logging.WARNING),
        curves(RunFolder(tmp_path / "run", 1, {}), tmp_path / "published", tensorboard=False) as sink,
    ):
        assert sink
        sink(1, {"loss": 2.5})
    assert list((tmp_path / "published").iterdir()) == []
    assert "DVCLive is not installed" in caplog.text


def test_without_curves_the_report_has_no_picture_of_them(finished: Workspace, tmp_path: Path) -> None:
    assert sections._training(finished, tmp_path).pictures
    shutil.copytree(finished.metrics, tmp_path / "metrics", ignore=shutil.ignore_patterns("curves"))
    section = sections._training(Workspace(tmp_path, finished.params_file), tmp_path)
    assert not section.pictures
    assert section.text


def test_a_library_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch, finished: Workspace) -> None:
    monkeypatch.setattr(report, "LIBRARIES", ("torch", "no-such-library"))
    assert "no-such-library not installed" in dict(report._environment(finished))["libraries"]
