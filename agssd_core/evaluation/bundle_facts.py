"""What a bundle says of itself: metadata, README and licence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from agssd_core.config import DataConfig
from agssd_core.config.node import ScanModality
from agssd_core.config.tasks import TaskConfig
from agssd_core.evaluation.finetune import Finetuned

_PACKAGES = ("nibabel", "scipy", "pillow", "einops", "fire")


@dataclass(frozen=True)
class BundleItem:
    """One held-out image.

    Attributes:
        image: relative to the folder of the data. label: a file likewise, or a class's number.
    """

    name: str
    image: str
    label: str | int
    modality: ScanModality
    site: str


@dataclass(frozen=True)
class BundleFacts:
    """What a reader of the bundle wants to know beside the network.

    Attributes:
        dataset: name of the data set.
        licence: of the data, in words.
        names: of the structures from 1 on, or of the classes.
        encoder: where the encoder comes from, in words.
        training: sites -> scans learned from.
    """

    dataset: str
    licence: str
    names: tuple[str, ...]
    encoder: str
    training: Mapping[str, int]


def metadata(
    done: Finetuned,
    task: TaskConfig,
    data: DataConfig,
    items: Sequence[BundleItem],
    facts: BundleFacts,
) -> dict[str, Any]:
    """MONAI's ``metadata.json``, as a mapping."""
    modalities = sorted({item.modality for item in items})
    formats = _formats(done, task, modalities, facts)
    kind = f"{task.kind} of {', '.join(facts.names)}"
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/"
        "0.8.1/meta_schema_20240725.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in _PACKAGES},
        "supported_apps": {},
        "name": task.name,
        "task": kind,
        "description": f"{done.build['name']} for {kind}, fine-tuned on {facts.dataset} from "
        f"{facts.encoder}.",
        "authors": "made with agssd-federation",
        "copyright": "of the weights: with whoever trained them",
        "license": f"code Apache-2.0; the data's licence binds the weights: {facts.licence}",
        "data_source": facts.dataset,
        "data_type": "png" if modalities == ["US"] else "nifti",
        "image_classes": "one channel, scaled to [0, 1] as scripts/bundle_prepare.py does",
        "label_classes": formats["outputs"]["pred"]["channel_def"],
        "pred_classes": formats["outputs"]["pred"]["channel_def"],
        "intended_use": "Research. No medical device; not for diagnosis or treatment.",
        "training_scans": dict(facts.training),
        "held_out_scans": len(items),
        "voxel_spacing_mm": None if modalities == ["US"] else list(data.spacing_mm),
        "eval_metrics": {},
        "references": [],
        "network_data_format": formats,
    }


def _formats(
    done: Finetuned, task: TaskConfig, modalities: Sequence[str], facts: BundleFacts
) -> dict[str, Any]:
    """What the network takes and gives."""
    shape, segments = list(done.build["size"]), task.kind == "segmentation"
    names = ["background", *facts.names] if segments else list(facts.names)
    answer = {
        "type": "image" if segments else "probabilities",
        "format": "segmentation" if segments else "classification",
        "num_channels": len(names),
        "spatial_shape": shape if segments else [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": segments and len(shape) == 3,
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }
    image = {
        "type": "image",
        "format": "hounsfield" if modalities == ["CT"] else "magnitude",
        "modality": ", ".join(modalities),
        "num_channels": 1,
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": len(shape) == 3,
        "channel_def": {"0": "image"},
    }
    return {"inputs": {"image": image}, "outputs": {"pred": answer}}


def readme(task: TaskConfig, facts: BundleFacts) -> str:
    """The bundle's ``docs/README.md``."""
    label = "`label` (a label map)" if task.kind == "segmentation" else "`label` (a class number)"
    return f"""# {task.name}

{task.kind.capitalize()} of {", ".join(facts.names)}, fine-tuned on {facts.dataset} from
{facts.encoder}. For research; no medical device.

    pip install "monai[{",".join(_PACKAGES)}]"
    python -m monai.bundle run --config_file BUNDLE/configs/inference.json

It predicts the images of `configs/datalist.json`, which are relative to `dataset_dir` (by default
the folder `data` beside the bundle), and writes `eval/predictions`, `eval/predictions.csv` and
`eval/metrics.json`. For other images write a list of the same form, in which {label} and `site`
may be absent, and name it:

    python -m monai.bundle run --config_file BUNDLE/configs/inference.json \\
        --datalist my.json --dataset_dir /my/images --output_dir /my/answers

Volumes are NIfTI (CT in Hounsfield units), ultrasound is PNG of a whole screen. Predictions lie on
the image's own pixels. `scripts` holds copies of the modules of agssd-federation that prepare
images; models/model.pt is a state dict, read with `weights_only`.
"""


def licence(facts: BundleFacts) -> str:
    """The bundle's ``LICENSE``."""
    return (
        "Code (scripts/, configs/): Apache License 2.0, "
        "https://www.apache.org/licenses/LICENSE-2.0\n\n"
        f"Weights (models/): made from {facts.dataset}, whose licence is: {facts.licence}\n"
        "Read it before you hand the weights on. Licences of the data that the encoder was\n"
        "pre-trained on bind them too.\n"
    )
