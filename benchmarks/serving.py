"""The server against the bare ONNX Runtime session and LitServe, interleaved, on two cores with the client on the same.

python -m benchmarks.serving   (or `make bench-serving`; in the root of the project)
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks import fixtures, load, processes
from serving.preprocess import PILLOW_MAX_PIXELS, Preprocessing, decode, prepare

Precision = Literal["float32", "int8"]
GRAPHS: dict[Precision, str] = {"float32": "encoder.onnx", "int8": "encoder.int8.onnx"}
RAW_BATCH_SIZES = (1, 8)
NUM_CLIENTS = (1, 8, 32)
NUM_CORES = 2
NPY = "application/x-npy"

# What the project asks of itself.
MIN_OF_RAW, MIN_OF_LITSERVE, MIN_INT8_OF_LITSERVE = 0.9, 1.0, 1.7
MAX_LATENCY_FACTOR, LATENCY_ALLOWANCE_MS = 1.15, 4.0
# Above this share of a CPU in other hands a round says little.
QUIET_CPU = 0.1


@dataclass
class Round:
    """One round at one number of clients: the figures of every contender, taken one after the other."""

    num_clients: int
    raw: dict[int, dict[str, float]] = field(default_factory=dict)
    litserve: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)

    @property
    def raw_images_per_s(self) -> float:
        """The best batch size's."""
        return max(figures["images_per_s"] for figures in self.raw.values())

    @property
    def others_cpu(self) -> float:
        """The most that other processes used beside any of the figures."""
        return max(figures["others_cpu"] for figures in (*self.raw.values(), self.litserve, self.ours))


@dataclass
class Check:
    """One line of the acceptance: the median over the rounds, and the limit that it must keep."""

    name: str
    value: float
    lowest: float
    highest: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Contest:
    """All rounds of one bundle in one precision (LitServe always runs float32)."""

    bundle: str
    precision: Precision
    idle_cpu: dict[str, float]
    rounds: list[Round]

    def checks(self) -> list[Check]:
        found = []
        for num_clients in NUM_CLIENTS:
            rounds = [item for item in self.rounds if item.num_clients == num_clients]
            if not rounds:
                continue
            of_litserve = [item.ours["images_per_s"] / item.litserve["images_per_s"] for item in rounds]
            if num_clients == 1:
                factors = [item.ours["p50_ms"] / (item.raw[1]["p50_ms"] + LATENCY_ALLOWANCE_MS) for item in rounds]
                found.append(_check("1 client: latency / (raw + 4 ms)", factors, MAX_LATENCY_FACTOR, False))
            elif self.precision == "float32":
                of_raw = [item.ours["images_per_s"] / item.raw_images_per_s for item in rounds]
                found.append(_check(f"{num_clients} clients: ours / raw", of_raw, MIN_OF_RAW, True))
                found.append(_check(f"{num_clients} clients: ours / LitServe", of_litserve, MIN_OF_LITSERVE, True))
            else:
                name = f"{num_clients} clients: ours int8 / LitServe float32"
                found.append(_check(name, of_litserve, MIN_INT8_OF_LITSERVE, True))
        return found


def _check(name: str, values: Sequence[float], limit: float, at_least: bool) -> Check:
    return Check(name, statistics.median(values), min(values), max(values), limit, at_least)


def contest(bundle: Path, precision: Precision, num_rounds: int, seconds: float) -> Contest:
    """Start the three, and measure them in turn, each alone under load while the others wait."""
    with tempfile.TemporaryDirectory() as folder, contenders(bundle, precision, Path(folder)) as (raw, servers):
        idle = processes.idle_cpu(servers, min(seconds, 3))
        rounds = [_round(raw, servers, clients, seconds) for _ in range(num_rounds) for clients in NUM_CLIENTS]
    return Contest(bundle.name, precision, idle, rounds)


@contextmanager
def contenders(
    bundle: Path, precision: Precision, folder: Path
) -> Iterator[tuple[processes.RawSession, dict[str, processes.Server]]]:
    """The bare session, LitServe and our server over one bundle; their logs and inputs go into `folder`."""
    picture = fixtures.jpeg()
    preprocessing = Preprocessing.model_validate(json.loads((bundle / "bundle.json").read_text())["preprocessing"])
    np.save(folder / "image.npy", prepare(decode(picture, max_pixels=PILLOW_MAX_PIXELS), preprocessing))
    as_json = json.dumps({"image": base64.b64encode(picture).decode()}).encode()
    (folder / "litserve.http").write_bytes(load.request("/embed", as_json, "application/json", NPY))
    (folder / "ours.http").write_bytes(load.request("/embed", picture, "image/jpeg", NPY))
    ours = ["--bundle", str(bundle), "--port", "{port}", "--device", "cpu"]
    environment = {"CAE_SERVING_PRECISION": precision, "CAE_SERVING_LOG_LEVEL": "warning"}
    with ExitStack() as stack:
        raw = stack.enter_context(processes.raw_session(bundle / GRAPHS[precision], folder / "image.npy"))
        servers = {
            "litserve": stack.enter_context(
                processes.server(
                    "benchmarks.litserve_server",
                    [str(bundle), "{port}"],
                    "/health",
                    folder / "litserve.http",
                    folder / "litserve.log",
                    {},
                )
            ),
            "ours": stack.enter_context(
                processes.server(
                    "serving", ours, "/health/ready", folder / "ours.http", folder / "ours.log", environment
                )
            ),
        }
        yield raw, servers


def _round(raw: processes.RawSession, servers: dict[str, processes.Server], num_clients: int, seconds: float) -> Round:
    measured = Round(num_clients)
    # LitServe polls its queues while it waits, which would be taken from the others.
    with servers["litserve"].paused():
        for batch_size in RAW_BATCH_SIZES:
            with processes.others_cpu() as others:
                figures = raw.measure(batch_size, seconds / len(RAW_BATCH_SIZES))
            measured.raw[batch_size] = figures | others
        measured.ours = _answered(servers["ours"], num_clients, seconds)
    measured.litserve = _answered(servers["litserve"], num_clients, seconds)
    return measured


def _answered(server: processes.Server, num_clients: int, seconds: float) -> dict[str, float]:
    with processes.others_cpu() as others:
        figures = processes.load(server, num_clients, min(1.0, seconds), seconds)
    if figures["num_failed"]:
        raise RuntimeError(f"{server.process.args!r} refused {figures['num_failed']:.0f} of its requests")
    return figures | others


def client_cost(seconds: float) -> dict[str, float]:
    """What the load client itself costs: its figures against a server that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        request, log = Path(folder, "request.http"), Path(folder, "log")
        request.write_bytes(load.request("/embed", fixtures.jpeg(), "image/jpeg", NPY))
        with processes.server("benchmarks.trivial_server", ["{port}"], "/", request, log, {}) as server:
            return processes.load(server, 8, min(1.0, seconds), seconds)


def table(result: Contest) -> str:
    """Medians over the rounds, lowest and highest in brackets, and the acceptance."""
    lines = [
        f"\n{result.bundle}, {result.precision}; processors that idle servers use: "
        + ", ".join(f"{name} {share:.2f}" for name, share in result.idle_cpu.items()),
        f"{'':14}{'images/s':>24}{'p50 ms':>10}{'p99 ms':>10}{'others':>10}",
    ]
    for num_clients in NUM_CLIENTS:
        rounds = [item for item in result.rounds if item.num_clients == num_clients]
        contestants = {
            **{f"raw b{size}": [item.raw[size] for item in rounds] for size in RAW_BATCH_SIZES},
            "LitServe": [item.litserve for item in rounds],
            "ours": [item.ours for item in rounds],
        }
        lines += [_row(f"c{num_clients} {name}", figures) for name, figures in contestants.items() if figures]
    for check in result.checks():
        bound = f"{'at least' if check.at_least else 'at most'} {check.limit}"
        lines.append(
            f"{'met   ' if check.met else 'MISSED'} {check.name}: {check.value:.2f} "
            f"({check.lowest:.2f} to {check.highest:.2f}), {bound}"
        )
    loud = sum(item.others_cpu > QUIET_CPU for item in result.rounds)
    if loud:
        lines.append(f"beside {loud} of {len(result.rounds)} rounds other processes used more than {QUIET_CPU} CPU")
    return "\n".join(lines)


def _row(name: str, rounds: Sequence[dict[str, float]]) -> str:
    def median(key: str) -> float:
        return statistics.median(figures.get(key, float("nan")) for figures in rounds)

    speeds = [figures["images_per_s"] for figures in rounds]
    speed = f"{median('images_per_s'):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"
    return f"{name:14}{speed:>24}{median('p50_ms'):>10.1f}{median('p99_ms'):>10.1f}{median('others_cpu'):>10.2f}"


def _cases(bundles: Sequence[Path], precisions: Sequence[Precision]) -> Iterator[tuple[Path, Precision]]:
    for bundle in bundles:
        for precision in precisions:
            if (bundle / GRAPHS[precision]).is_file():
                yield bundle, precision
            else:
                sys.stderr.write(f"{bundle}: has no {GRAPHS[precision]}, left out\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a line of the acceptance is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is measured (default: 5)")
    parser.add_argument("--seconds", type=float, default=8, help="length of one measurement (default: 8)")
    parser.add_argument(
        "--bundle",
        type=Path,
        action="append",
        help="folder of a bundle, may be repeated (default: models/bundle, and a ViT-S/16 of random weights)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        action="append",
        help="may be given several times (default: those that the bundle has)",
    )
    parser.add_argument("--out", type=Path, help="file for all figures, as JSON")
    given = parser.parse_args(arguments)
    own = processes.ROOT / "models/bundle"
    bundles = given.bundle or [own] * own.is_dir() + [fixtures.vit_small_bundle(processes.ROOT)]
    cost = client_cost(min(given.seconds, 3))
    sys.stdout.write(
        f"load client alone: {cost['images_per_s']:.0f} requests/s, "
        f"{cost['client_cpu_ms_per_request']:.2f} ms of a CPU for each\n"
    )
    results = []
    for bundle, precision in _cases(bundles, given.precision or list(GRAPHS)):
        results.append(contest(bundle, precision, given.rounds, given.seconds))
        sys.stdout.write(table(results[-1]) + "\n")
        sys.stdout.flush()
    if given.out:
        content: dict[str, Any] = {"client": cost, "contests": [asdict(result) for result in results]}
        given.out.write_text(json.dumps(content, indent=2) + "\n")
    return int(not all(check.met for result in results for check in result.checks()))


def stay_on_two_cores() -> None:
    """Servers, session and client share them: whatever is started from here inherits it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])


if __name__ == "__main__":
    stay_on_two_cores()
    sys.exit(main())
