"""Trained ultrasound models and their exported files."""

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from agssd_core.evaluation.export_resnet import export_resnet
from agssd_core.models.anaus import AnausPair, AnausShape
from agssd_core.models.resnet2d import ResnetShape
from tests.support.models import randomised

GROUP = {"norm": "group", "groups": 4}


def fresh(depth=18, *, width=8, share=False, **backbone):
    torch.manual_seed(0)
    kind = ResnetShape(depth=depth, width=width, **backbone)
    heads = {"fpn": 12, "hidden_projector": 8, "projection": 4, "hidden_predictor": 8}
    return AnausPair(AnausShape(kind, share_statistics=share, **heads)).train()


def trained(depth=18, **shape):
    """A pair whose networks differ everywhere and have seen a few batches."""
    pair = fresh(depth, **shape)
    for number, network in enumerate((pair.student, pair.teacher)):
        randomised(network.pyramid, number)
        with torch.no_grad():
            for parameter in network.backbone.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for _ in range(3):
                network.maps(torch.rand(4, 1, 64, 64))
    return pair


def own_statistics(pair):
    """As a site's training state holds them."""
    return {n: np.atleast_1d(b.numpy().copy()) for n, b in pair.norm_buffers().items()}


def exported(tmp_path, pair, form, *, network="teacher", statistics=None):
    out = tmp_path / f"{form}.safetensors"
    if statistics is None:
        statistics = own_statistics(pair)
    export_resnet(
        pair.shared_weights(),
        pair.shape,
        network=network,
        form=form,
        out=out,
        statistics=statistics,
    )
    with safe_open(out, framework="pt") as stream:
        return load_file(out), stream.metadata()
