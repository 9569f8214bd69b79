"""Write a fine-tuned network as a MONAI bundle that needs MONAI and not this package.

``python -m monai.bundle run --config_file BUNDLE/configs/inference.json`` reads the images of
``configs/datalist.json``, relative to ``dataset_dir``, and writes predictions and their Dice.

Preprocessing must be that of pre-training to the last bit, and finding the body or an ultrasound
sector is nothing that MONAI's transforms or TorchScript express. So the bundle's folder
``scripts``, which MONAI puts on Python's path itself, holds copies of this package's own modules
with their imports turned to each other. Weights are a state dict, loaded with ``weights_only``.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from agssd_core.config import DataConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.evaluation.bundle_facts import (
    BundleFacts,
    BundleItem,
    licence,
    metadata,
    readme,
)
from agssd_core.evaluation.finetune import Finetuned
from agssd_core.weights import sync_folder, write_bytes, write_text

MODULES = (
    "errors",
    "data.quiet",
    "data.frame_source",
    "data.shrink",
    "data.thinning",
    "data.sector",
    "data.clip_survey",
    "data.still",
    "data.volume",
    "data.preprocess",
    "evaluation.bundle_settings",
    "evaluation.bundle_prepare",
    "evaluation.bundle_run",
    "evaluation.finetune_nets",
    "evaluation.finetune_predict",
)
_IMPORT = re.compile(r"^from agssd_core\.(?:\w+\.)*(\w+) import", re.MULTILINE)
_INIT = '''"""Copies of modules of agssd-federation (Apache-2.0), for MONAI to call."""

from pathlib import Path


def root() -> str:
    """The bundle's own folder."""
    return str(Path(__file__).resolve().parent.parent)
'''


def write_bundle(
    folder: Path,
    done: Finetuned,
    task: TaskConfig,
    data: DataConfig,
    items: Sequence[BundleItem],
    facts: BundleFacts,
) -> None:
    """Write the bundle, complete or not at all; one that stands there is replaced.

    Args:
        folder: the bundle's root. Its default ``dataset_dir`` is the folder ``data`` beside it.
        done: the network.
        task: what it answers.
        data: preprocessing of the network's images.
        items: the held-out images.
        facts: for ``metadata.json`` and the README.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_parts(temporary, done, task, data, items, facts)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record_results(folder: Path, results: Mapping[str, float]) -> None:
    """Put what the bundle reached on its images into ``metadata.json``."""
    file = folder / "configs" / "metadata.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, _json({**found, "eval_metrics": dict(results)}))


def _write_parts(
    root: Path,
    done: Finetuned,
    task: TaskConfig,
    data: DataConfig,
    items: Sequence[BundleItem],
    facts: BundleFacts,
) -> None:
    configs = root / "configs"
    write_text(configs / "inference.json", _json(_inference(done, task, data, facts)))
    write_text(configs / "metadata.json", _json(metadata(done, task, data, items, facts)))
    rows = [{name: getattr(item, name) for name in item.__dataclass_fields__} for item in items]
    datalist = {"name": facts.dataset, "numTraining": len(done.trained_on), "test": rows}
    write_text(configs / "datalist.json", _json(datalist))
    stream = io.BytesIO()
    state = {name: tensor.cpu() for name, tensor in done.network.state_dict().items()}
    torch.save(state, stream)
    write_bytes(root / "models" / "model.pt", stream.getvalue())
    write_text(root / "scripts" / "__init__.py", _INIT)
    for name, text in scripts().items():
        write_text(root / "scripts" / name, text)
    write_text(root / "docs" / "README.md", readme(task, facts))
    write_text(root / "LICENSE", licence(facts))


def scripts() -> dict[str, str]:
    """File name -> text of every module that a bundle carries."""
    found = {}
    for module in MODULES:
        source = files("agssd_core").joinpath(
            *module.split(".")[:-1], module.split(".")[-1] + ".py"
        )
        text = source.read_text(encoding="utf-8")
        text = text.replace("from agssd_core.config.data import", "from .bundle_settings import")
        found[f"{module.split('.')[-1]}.py"] = _IMPORT.sub(r"from .\1 import", text)
    return found


def _inference(
    done: Finetuned, task: TaskConfig, data: DataConfig, facts: BundleFacts
) -> dict[str, Any]:
    """MONAI's configuration; every key can be replaced on the command line."""
    pictured = task.kind == "segmentation"
    network = {"_target_": f"scripts.finetune_nets.{done.build['name']}", **done.build["arguments"]}
    return {
        "imports": ["$import monai", "$import torch", "$import pathlib"],
        "bundle_root": {"_target_": "scripts.root"},
        "dataset_dir": "$str(pathlib.Path(@bundle_root).resolve().parent / 'data')",
        "datalist": "$@bundle_root + '/configs/datalist.json'",
        "output_dir": "$@bundle_root + '/eval'",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": {
            "_target_": "scripts.finetune_nets.load_network",
            "network": "@network_def",
            "file": "@ckpt_path",
            "device": "@device",
        },
        "preprocessing": {
            "_target_": "scripts.bundle_prepare.Preparation",
            "spacing_mm": list(data.spacing_mm),
            "ct_window_hu": list(data.ct_window_hu),
            "mr_percentiles": list(data.mr_percentiles),
            "max_side": data.frames.max_side,
        },
        "inferer": {
            "_target_": "scripts.finetune_predict.Predictor",
            "network": "@network",
            "size": list(done.build["size"]),
            "overlap": done.overlap,
            "device": "@device",
        },
        "dataset": "$monai.data.load_decathlon_datalist("
        f"@datalist, {pictured}, 'test', @dataset_dir)",
        "evaluator": {
            "_target_": "scripts.bundle_run.Runner",
            "items": "@dataset",
            "preparation": "@preprocessing",
            "predictor": "@inferer",
            "kind": task.kind,
            "names": list(facts.names),
            "output_dir": "@output_dir",
        },
        "run": ["$@evaluator.run()"],
    }


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
