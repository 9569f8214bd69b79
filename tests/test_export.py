"""Exports load into plain MONAI networks and give the same tokens."""

import json

import pytest
import torch
from monai.networks.nets import UNETR, ViT
from safetensors import safe_open
from safetensors.torch import load_file

from agssd_core.errors import ConfigError, WeightsError
from agssd_core.evaluation.export_vit import export_vit
from agssd_core.models.vit3d import VisionTransformer3d, VitShape
from tests.support.models import randomised, tiny_model, tiny_vit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


UNETR_VIT = VitShape(
    image_size=(32, 32, 32), patch_size=16, width=24, depth=12, heads=4, mlp_ratio=2.0
)


def exported(tmp_path, model, form, *, network="teacher", **more):
    out = tmp_path / "out" / f"{form}.safetensors"
    export_vit(model.shared_weights(), model.shape, network=network, form=form, out=out, **more)
    with safe_open(out, framework="pt") as stream:
        return load_file(out), stream.metadata()


def trained(vit=None):
    """A pair whose student and teacher differ everywhere."""
    model = tiny_model(vit=vit)
    randomised(model.student, 1, std=0.2)
    randomised(model.teacher, 2, std=0.2)
    return model.eval()


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"image_size": (16, 8, 12)}], ids=str)
def test_m1_a_plain_monai_vit_gives_the_same_tokens(tmp_path, network, changes):
    model = trained(tiny_vit(**changes))
    tensors, metadata = exported(tmp_path, model, "monai-vit", network=network)
    vit = ViT(**json.loads(metadata["monai.networks.nets.ViT"])).eval()
    vit.load_state_dict(tensors, strict=True)
    crops = torch.rand(2, 1, *model.shape.vit.image_size)
    cls, tokens = getattr(model, network).encode(crops)
    expected = torch.cat([cls[:, None], tokens], dim=1)
    torch.testing.assert_close(vit.norm(vit(crops)[1][-1]), expected, atol=1e-5, rtol=0)


def test_m1_fixed_positions_are_filled_in(tmp_path):
    model = trained(tiny_vit(pos_embed="sincos"))
    tensors, metadata = exported(tmp_path, model, "monai-vit")
    arguments = json.loads(metadata["monai.networks.nets.ViT"])
    assert arguments["pos_embed_type"] == "sincos"
    # Learnable here, so that no table of MONAI's own could stand in for a missing tensor.
    vit = ViT(**{**arguments, "pos_embed_type": "learnable"}).eval()
    vit.load_state_dict(tensors, strict=True)
    crops = torch.rand(2, 1, 16, 16, 16)
    tokens = vit.norm(vit(crops)[1][-1])[:, 1:]
    torch.testing.assert_close(tokens, model.teacher.encode(crops)[1], atol=1e-5, rtol=0)


def test_m2_unetr_takes_every_tensor_of_its_encoder(tmp_path):
    model = trained(UNETR_VIT)
    tensors, metadata = exported(tmp_path, model, "monai-unetr")
    arguments = json.loads(metadata["monai.networks.nets.UNETR"])
    network = UNETR(**arguments, in_channels=1, out_channels=2, feature_size=4)
    outcome = network.load_state_dict(tensors, strict=False)
    assert outcome.unexpected_keys == []
    assert [name for name in outcome.missing_keys if name.startswith("vit.")] == []
    torch.testing.assert_close(
        network.vit.blocks[11].attn.qkv.weight, model.teacher.encoder.blocks[11].attn.qkv.weight
    )
    torch.testing.assert_close(
        network.vit.patch_embedding.position_embeddings, model.teacher.encoder.pos_embed.weight
    )
    assert network(torch.rand(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_our_own_form_rebuilds_our_encoder(tmp_path):
    model = trained()
    tensors, metadata = exported(tmp_path, model, "safetensors")
    arguments = json.loads(metadata["agssd_core.models.vit3d.VitShape"])
    size = tuple(arguments.pop("image_size"))
    encoder = VisionTransformer3d(VitShape(image_size=size, **arguments)).eval()
    encoder.load_state_dict(tensors, strict=True)
    crops = torch.rand(2, 1, 16, 16, 16)
    assert torch.equal(encoder(crops)[1], model.teacher.encode(crops)[1])


def test_an_export_says_where_it_comes_from_and_is_repeatable(tmp_path):
    model = trained()
    notes = {"spacing_mm": "1.5 1.5 1.5"}
    state = torch.get_rng_state()
    first, metadata = exported(tmp_path / "a", model, "monai-vit", notes=notes)
    assert torch.equal(torch.get_rng_state(), state)
    assert metadata["network"] == "teacher"
    assert metadata["spacing_mm"] == "1.5 1.5 1.5"
    assert len(metadata["weights_digest"]) == 64
    torch.manual_seed(99)
    second, _ = exported(tmp_path / "b", model, "monai-vit")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_unetr_is_refused_where_it_cannot_hold_the_encoder(tmp_path):
    with pytest.raises(ConfigError, match=r"has 2 blocks and patch size 4.*--format monai-vit"):
        exported(tmp_path, trained(), "monai-unetr")
    assert list(tmp_path.rglob("*")) == []


def test_a_checkpoint_without_a_teacher_says_so(tmp_path):
    model = trained()
    weights = model.shared_weights(include_teacher=False)
    out = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match=r"holds no teacher\. Export the other network"):
        export_vit(weights, model.shape, network="teacher", form="safetensors", out=out)


@pytest.mark.parametrize("changes", [{"depth": 1}, {"depth": 3}, {"width": 48}], ids=str)
def test_another_configuration_is_refused(tmp_path, changes):
    weights, out = trained().shared_weights(), tmp_path / "x.safetensors"
    shape = tiny_model(vit=tiny_vit(**changes)).shape
    with pytest.raises(WeightsError, match="configuration that is stored with the checkpoint"):
        export_vit(weights, shape, network="teacher", form="monai-vit", out=out)
    assert not out.exists()
