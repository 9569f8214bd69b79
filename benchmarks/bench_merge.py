"""Merge memory with 3 and 30 sites, and time against holding every model.

Each figure is taken in a process of its own, so that peak memory is that merge's alone. The
must: with a linear rule, 30 sites need the memory of 3 (within 10 %).

    python -m benchmarks.bench_merge [--quick]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agssd_core.config import MergeConfig
from agssd_core.protocol import PROTOCOL_VERSION, SiteUpdate, UpdateHeader
from agssd_core.weights import Weights, load_weights, save_weights, weights_digest
from server.merge import MergeState, merge_round, site_weights
from server.spool import RoundSpool

FULL, QUICK = 25_000_000, 4_000_000
LIMIT = 1.10


def make_model(parameters: int, seed: int) -> Weights:
    """Arrays shaped like a ViT-S encoder's: 12 blocks of four matrices and their biases."""
    rng = np.random.default_rng(seed)
    width = int((parameters / (12 * 12)) ** 0.5)
    shapes = {"qkv": (3 * width, width), "proj": (width, width)}
    shapes |= {"up": (4 * width, width), "down": (width, 4 * width)}
    weights: Weights = {"state/centre_cls": rng.standard_normal(4096, dtype=np.float32)}
    for block in range(12):
        for name, shape in shapes.items():
            key = f"student/blocks.{block}.{name}"
            weights[f"{key}.weight"] = rng.standard_normal(shape, dtype=np.float32)
            weights[f"{key}.bias"] = rng.standard_normal(shape[0], dtype=np.float32)
    return weights


def fill(folder: Path, *, sites: int, parameters: int) -> None:
    """A base and the spool of a round."""
    save_weights(folder / "base.safetensors", make_model(parameters, 0))
    spool = RoundSpool(folder / "spool")
    for index in range(sites):
        weights = make_model(parameters, index + 1)
        header = UpdateHeader(
            protocol=PROTOCOL_VERSION,
            run="bench",
            cohort="ct-mr",
            site=f"site-{index:02d}",
            round=0,
            steps=1,
            patient_count=index + 1,
            base_digest="",
            nonce="",
            schema_digest="",
            weights_digest="",
            metrics={},
        )
        spool.add(SiteUpdate(header, weights))


def merge_streaming(folder: Path, rule: str) -> Weights:
    """The product's merge."""
    spool = RoundSpool(folder / "spool")
    counts = {site: spool.header(site).patient_count for site in spool.sites()}
    shares = site_weights(counts, weighting="patients", cap=0.4)
    return merge_round(
        load_weights(folder / "base.safetensors"),
        spool,
        merge=MergeConfig(student=rule, teacher="server-ema"),
        shares=shares,
        ema_product=0.9,
        state=MergeState(),
    ).weights


def merge_holding_all(folder: Path) -> Weights:
    """The naive form: read every model, then sum in site order."""
    spool = RoundSpool(folder / "spool")
    counts = {site: spool.header(site).patient_count for site in spool.sites()}
    shares = site_weights(counts, weighting="patients", cap=0.4)
    base = load_weights(folder / "base.safetensors")
    models = {site: {name: spool.read(site, name) for name in base} for site in shares}
    merged: Weights = {}
    for name in base:
        stack = np.stack([np.float64(shares[s]) * models[s][name] for s in shares])
        merged[name] = stack.sum(axis=0).astype(np.float32)
    return merged


def measure(folder: Path, how: str) -> dict[str, object]:
    """Run one merge in this process: digest, seconds, peak bytes over the idle process."""
    # Linux forgets the peak of the imports, which would hide that of a small merge.
    Path("/proc/self/clear_refs").write_text("5")
    idle = _status("VmRSS")
    start = time.perf_counter()
    merged = merge_holding_all(folder) if how == "naive" else merge_streaming(folder, how)
    seconds = time.perf_counter() - start
    peak = _status("VmHWM")
    return {
        "digest": weights_digest(merged),
        "seconds": seconds,
        "peak": peak - idle,
        "total": float(np.sum([np.abs(array).sum(dtype=np.float64) for array in merged.values()])),
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def in_process_of_its_own(folder: Path, how: str) -> dict[str, float]:
    """``measure`` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.bench_merge", "--measure", str(folder), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def run(*, quick: bool = False) -> bool:
    """Print the table; whether the must is met."""
    parameters, counts = (QUICK, (3, 12)) if quick else (FULL, (3, 30))
    rules = ("fedavg", "fedadam") if quick else ("fedavg", "fedadam", "trimmed-mean")
    ok = True
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as name:
        for sites in counts:
            folder = Path(name) / str(sites)
            fill(folder, sites=sites, parameters=parameters)
            found = {rule: in_process_of_its_own(folder, rule) for rule in rules}
            naive = in_process_of_its_own(folder, "naive")
            assert abs(found["fedavg"]["total"] / naive["total"] - 1) < 1e-6  # noqa: S101
            for rule in rules:
                peaks.setdefault(rule, []).append(found[rule]["peak"])
                print(_row(rule, sites, found[rule], naive))
            print(_row("holding all", sites, naive, naive))
    model_bytes = 4 * parameters
    for rule in rules:
        ratio = peaks[rule][1] / peaks[rule][0]
        must = rule != "trimmed-mean"
        ok &= ratio <= LIMIT or not must
        verdict = ("ok" if ratio <= LIMIT else "MISSED") if must else "robust: K x largest array"
        print(
            f"merge memory {rule:13s} {counts[1]} / {counts[0]} sites of "
            f"{parameters / 1e6:.0f} M: {ratio:5.3f} ({peaks[rule][1] / model_bytes:.1f} models)"
            f"  must <= {LIMIT:.2f}  {verdict}"
        )
    return ok


def _row(label: str, sites: int, found: dict[str, float], naive: dict[str, float]) -> str:
    return (
        f"{label:13s} {sites:3d} sites: peak {found['peak'] / 1e6:7.0f} MB, "
        f"{found['seconds']:6.2f} s, time / holding all {found['seconds'] / naive['seconds']:.2f}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer sites")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), given.measure[1])))
        return 0
    return 0 if run(quick=given.quick) else 1


if __name__ == "__main__":
    raise SystemExit(main())
