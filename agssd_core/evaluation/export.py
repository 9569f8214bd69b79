"""One encoder of a checkpoint in another library's form, whichever cohort it is of.

``export_vit`` and ``export_resnet`` say how each file is loaded.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from agssd_core.config import Cohort, RunConfig
from agssd_core.errors import ConfigError
from agssd_core.evaluation.export_file import Network
from agssd_core.evaluation.export_resnet import ResnetForm, export_resnet
from agssd_core.evaluation.export_vit import VitForm, export_vit
from agssd_core.training.anaus_build import pair_shape
from agssd_core.training.build import model_shape
from agssd_core.weights import Weights

ExportFormat = Literal[
    "monai-vit", "monai-unetr", "torchvision-resnet", "monai-resnet", "fpn", "safetensors"
]
_VIT: dict[str, VitForm] = {form: form for form in get_args(VitForm)}
_RESNET: dict[str, ResnetForm] = {form: form for form in get_args(ResnetForm)}


def export_encoder(
    weights: Weights,
    config: RunConfig,
    *,
    network: Network,
    form: ExportFormat | None,
    out: Path,
    statistics: Weights | None = None,
) -> ExportFormat:
    """Write one network's encoder, atomically.

    Args:
        weights: a checkpoint's arrays.
        config: stored with the checkpoint; its ``federation.cohort`` says whose encoder it is.
        network: which of the pair.
        form: names and shapes of the arrays; None is the cohort's MONAI form.
        out: the file to write.
        statistics: a site's own running statistics, see ``export_resnet``.

    Returns:
        The form that was written.

    Raises:
        ConfigError: the cohort's encoder cannot be expressed in that form.
        WeightsError: the checkpoint holds no such network, or one of another shape.
        CheckpointError: a BatchNorm encoder has no running statistics.
    """
    if config.federation.cohort == "us":
        resnet = _RESNET.get(form or "monai-resnet")
        if resnet is None:
            raise _unfit("us", form, _RESNET)
        export_resnet(
            weights,
            pair_shape(config.anaus),
            network=network,
            form=resnet,
            out=out,
            statistics=statistics,
        )
        return resnet
    vit = _VIT.get(form or "monai-vit")
    if vit is None:
        raise _unfit("ct-mr", form, _VIT)
    export_vit(weights, model_shape(config.agssd), network=network, form=vit, out=out)
    return vit


def _unfit(cohort: Cohort, form: str | None, others: Iterable[str]) -> ConfigError:
    encoder = "a 2D ResNet" if cohort == "us" else "a 3D vision transformer"
    return ConfigError(
        f"the encoder of cohort {cohort} is {encoder}, which has no form {form}. Export with "
        f"--format {' or '.join(others)}."
    )
