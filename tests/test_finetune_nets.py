import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR

from agssd_core.config import parse_config
from agssd_core.config.tasks import TaskConfig
from agssd_core.evaluation import export_resnet, export_vit
from agssd_core.evaluation.finetune_build import (
    build_network,
    load_encoder,
    network_build,
    parameter_groups,
)
from agssd_core.evaluation.finetune_predict import Predictor
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone
from agssd_core.models.vit3d import VisionTransformer3d
from agssd_core.training.anaus_build import pair_shape
from agssd_core.training.build import model_shape
from tests.support.labelled import checkpoint

SEGMENT = TaskConfig(name="s", kind="segmentation", structures=(1, 2))
CLASSIFY = TaskConfig(name="c", kind="classification", label="x")


def _config(cohort, **more):
    given = {"preset": "tiny", "cohorts": ["us"]} if cohort == "us" else {"preset": "tiny"}
    return parse_config(given | more).for_cohort(cohort)


def _network(config, task, seed=0):
    build = network_build(config, task, 3, 8)
    return build_network(build, seed=seed), build


@pytest.mark.parametrize("task", [SEGMENT, CLASSIFY], ids=["segment", "classify"])
def test_the_loaded_transformer_gives_the_tokens_of_pretraining(task):
    config = _config("ct-mr")
    weights = checkpoint(config)
    network, _ = _network(config, task)
    shape = model_shape(config.agssd).vit
    ours = VisionTransformer3d(shape)
    ours.load_state_dict(export_vit.encoder_tensors(weights, shape, network="teacher"))
    crops = torch.rand(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    cls, patches = ours.eval()(crops)
    expected = torch.cat([cls[:, None], patches], dim=1)

    at_random = network.encoder(crops)[0]
    load_encoder(network, weights, config)

    torch.testing.assert_close(network.encoder(crops)[0], expected, rtol=1e-4, atol=1e-5)
    assert (at_random - expected).abs().max() > 0.1


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_loaded_resnet_and_pyramid_give_the_maps_of_pretraining(norm):
    config = _config("us", anaus={"backbone": {"norm": norm}, "share_statistics": norm == "batch"})
    weights = checkpoint(config)
    network, _ = _network(config, SEGMENT)
    shape = pair_shape(config.anaus)
    tensors, _ = export_resnet.encoder_tensors(weights, shape, network="teacher")
    backbone = ResNetBackbone(shape.backbone)
    pyramid = FeaturePyramid(backbone.channels, shape.fpn)
    for part, name in ((backbone, "backbone."), (pyramid, "pyramid.")):
        part.load_state_dict(
            {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        )
    frames = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    colours = (frames - network.encoder.grey_mean) / network.encoder.grey_std
    c2_to_c5 = backbone.eval()(colours)

    assert load_encoder(network, weights, config) is False
    maps = network.eval().encoder(frames)

    torch.testing.assert_close(maps, c2_to_c5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.pyramid(maps)[:3], pyramid(c2_to_c5)[:3])


def test_batchnorm_whose_statistics_stayed_at_the_sites_is_to_be_measured():
    config = _config("us", anaus={"backbone": {"norm": "batch"}})
    network, _ = _network(config, CLASSIFY)
    assert load_encoder(network, checkpoint(config), config) is True


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
@pytest.mark.parametrize("task", [SEGMENT, CLASSIFY], ids=["segment", "classify"])
def test_new_layers_are_drawn_from_the_seed(cohort, task):
    config = _config(cohort)
    one, build = _network(config, task)
    again, other = build_network(build, seed=0), build_network(build, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_for_patches_of_16_and_12_blocks_the_ladder_is_that_of_monai():
    """Every layer but the cls token: the same number of parameters as MONAI's UNETR."""
    model = {"patch_size": 16, "depth": 12, "width": 48, "heads": 4, "pos_embed": "learnable"}
    size = {"global_size": [32, 32, 32], "local_size": [16, 16, 16]}
    config = _config("ct-mr", agssd={"model": model, "cvac": size})
    network, build = _network(config, SEGMENT)
    vit = build["arguments"]["vit"]
    theirs = UNETR(
        1, 3, (32, 32, 32), 8, vit["hidden_size"], vit["mlp_dim"], vit["num_heads"],
        qkv_bias=vit["qkv_bias"],
    )  # fmt: skip
    count = sum(p.numel() for p in network.parameters()) - network.encoder.cls_token.numel()
    assert count == sum(p.numel() for p in theirs.parameters())
    assert network.taps == [3, 6, 9]


@pytest.mark.parametrize("patch", [2, 3, 6, 8, 12])
def test_any_patch_size_gives_logits_of_the_whole_crop(patch):
    size = {"global_size": [2 * patch] * 3, "local_size": [patch] * 3}
    config = _config("ct-mr", agssd={"model": {"patch_size": patch}, "cvac": size})
    network, _ = _network(config, SEGMENT)
    assert network(torch.rand(1, 1, *size["global_size"])).shape == (1, 3, *size["global_size"])


@pytest.mark.parametrize("cohort", ["ct-mr", "us"])
@pytest.mark.parametrize("task", [SEGMENT, CLASSIFY], ids=["segment", "classify"])
def test_every_parameter_that_learns_is_in_one_group_and_gets_a_gradient(cohort, task):
    config = _config(cohort)
    network, build = _network(config, task)
    groups = parameter_groups(network, decay=0.5, weight_decay=0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    learning = [p for p in network.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(id(p) for p in learning)

    crops = torch.rand(2, 1, *build["size"], generator=torch.Generator().manual_seed(0))
    network(crops).square().sum().backward()
    assert all(p.grad is not None for p in learning)


def test_layers_near_the_image_learn_slowest():
    network, _ = _network(_config("us"), SEGMENT)
    share = {
        id(p): group["share"]
        for group in parameter_groups(network, decay=0.5, weight_decay=0.0)
        for p in group["params"]
    }
    rate = {name: share[id(p)] for name, p in network.named_parameters()}
    assert rate["encoder.backbone.conv1.weight"] == 0.5**5
    assert rate["encoder.backbone.layer1.0.conv1.weight"] == 0.5**4
    assert rate["encoder.backbone.layer4.0.conv1.weight"] == 0.5
    assert rate["pyramid.lateral.0.weight"] == 0.5
    assert rate["out.weight"] == 1


@pytest.mark.parametrize("shape", [(20, 40, 70), (32, 32, 32)])
def test_a_volume_of_any_size_is_predicted_voxel_by_voxel(shape):
    network, build = _network(_config("ct-mr"), SEGMENT)
    predictor = Predictor(network, size=build["size"], overlap=0.5)
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    found = predictor.segment(image)
    assert found.shape == (3, *shape)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)


def test_windows_without_body_have_no_say_in_a_class():
    config = _config("ct-mr")
    network, build = _network(config, CLASSIFY)
    predictor = Predictor(network, size=build["size"], overlap=0.5)
    image = np.zeros((32, 32, 96), np.float32)
    image[..., :32] = np.random.default_rng(0).random((32, 32, 32))
    inside = np.zeros(image.shape, bool)
    inside[..., :16] = True
    alone = predictor.classify(image[..., :32], inside[..., :32])
    np.testing.assert_allclose(predictor.classify(image, inside), alone, atol=1e-6)
    assert predictor.classify(image, np.ones_like(inside)) != pytest.approx(alone, abs=1e-6)
