"""A run's rows as its page reads them."""

import json

from agssd_core.config import dump_config, parse_config
from server.run_record import read_run
from server.verdicts import judge

HEALTHY = {
    "loss": 1.8,
    "loss_rec": 0.1,
    "rec_ratio": 0.5,
    "information_cls": 0.8,
    "information_patch": 2.1,
    "monitor_volumes": 256.0,
    "effective_rank": 9.0,
    "drift": 0.08,
    "drift_fused": 0.07,
}


def site_row(number, site, **changes):
    return {
        "round": number,
        "cohort": "ct-mr",
        "site": site,
        "kind": "site",
        "metrics": HEALTHY | changes,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "seconds": 30.0,
        "patient_count": 4,
        "volume_count": 7,
    }


def merge_row(number, **more):
    return {"round": number, "cohort": "ct-mr", "site": None, "kind": "merge", "metrics": {}} | more


def write_run(folder, rows, *, rounds=2, tail="", **manifest):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + tail)
    checkpoint = folder / "checkpoints" / f"round-{rounds:04d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    config = dump_config(parse_config({"preset": "tiny", "federation": {"rounds": rounds}}))
    content = {"round": rounds, "config": config, "weights_digest": "ab" * 32, **manifest}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    return folder


def healthy_rows(sites=("a", "b", "c"), rounds=2):
    rows = []
    for number in range(rounds):
        rows += [site_row(number, site) for site in sites]
        rows.append(merge_row(number))
    return rows


def findings(folder):
    return judge(read_run(folder))
