"""The page in a tab of Chromium: what a person does there, and what is to be seen."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Page, expect

from tests.e2e.page.pictures import Pixels, saved

CHROMIUM = Path("/usr/bin/chromium")
MAX_BODY_BYTES = 100_000


def add_to_bundle(folder: Path, examples: Sequence[bytes] = (), **changes: Any) -> Path:
    """Example images, and other values of `bundle.json`."""
    info = json.loads((folder / "bundle.json").read_text())
    info |= changes | {"examples": [f"example_{number}.png" for number in range(len(examples))]}
    for name, data in zip(info["examples"], examples, strict=True):
        saved(folder, name, data)
        info["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "bundle.json").write_text(json.dumps(info))
    return folder


@dataclass
class Tab:
    """One open page, with what a test reads from it."""

    page: Page
    problems: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def settle(self) -> None:
        """Wait until features and completions of the first image are there."""
        expect(self.page.locator("#latency tbody tr").first).to_be_visible()
        self.page.wait_for_load_state("networkidle")
        self.idle()

    def idle(self) -> None:
        expect(self.page.locator("[data-busy]")).to_have_count(0)

    @contextmanager
    def completing(self) -> Iterator[None]:
        """What is done in the context leads to a new completion; wait for it."""
        with self.page.expect_response(lambda answer: "view=completion" in answer.url and "skip" not in answer.url):
            yield
        self.idle()

    def pick(self, path: Path) -> None:
        with self.page.expect_response(lambda answer: "skip_regressor" in answer.url):
            self.page.set_input_files("#file", path)
        self.idle()

    def canvas(self, selector: str) -> Pixels:
        """The pixels of a canvas as the person sees their colours, uint8 [3, H, W]."""
        # From a copy: a canvas that is often read warns of it in the console.
        read = """c => {
          const context = new OffscreenCanvas(c.width, c.height).getContext("2d");
          context.drawImage(c, 0, 0);
          return [c.height, c.width, ...context.getImageData(0, 0, c.width, c.height).data];
        }"""
        height, width, *values = self.page.eval_on_selector(selector, read)
        return np.array(values, np.uint8).reshape(height, width, 4)[:, :, :3].transpose(2, 0, 1)

    def figure(self, name: str) -> Pixels:
        return self.canvas(f'[data-figure="{name}"] .frame canvas')

    def masked(self) -> list[int]:
        read = "cells => cells.flatMap((cell, index) => cell.ariaSelected === 'true' ? [index] : [])"
        chosen: list[int] = self.page.eval_on_selector_all("#grid [role=gridcell]", read)
        return chosen

    def values(self, name: str, low: float, high: float) -> NDArray[np.float64]:
        """What a person reads from a map by its legend, [N]."""
        scale = self.canvas(f'[data-figure="{name}"] .scale')[:, 0, :].T.astype(int)
        colours = self.figure(name).reshape(3, -1).T.astype(int)
        nearest = np.abs(colours[:, None] - scale[None]).sum(axis=2).argmin(axis=1)
        return low + (high - low) * nearest / (len(scale) - 1)

    def copied(self, button: str) -> str:
        self.page.get_by_role("button", name=button, exact=True).click()
        expect(self.page.locator("#command")).to_contain_text("Copied")
        text: str = self.page.evaluate("navigator.clipboard.readText()")
        return text


Open = Callable[..., Tab]


def shell(command: str, folder: Path, **variables: str) -> None:
    subprocess.run(
        ["sh", "-c", command], cwd=folder, env=os.environ | variables, check=True, capture_output=True, timeout=60
    )
