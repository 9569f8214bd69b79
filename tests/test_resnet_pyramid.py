"""The ultrasound backbone under torchvision's names, and its pyramid folded into pooling."""

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn

from agssd_core.errors import ShapeError
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone, ResnetShape
from agssd_core.views.regions import pooling_weights, present_ids, region_pyramid

TINY = {"width": 16, "groups": 4}
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def torchvision_names(depth):
    """Names and shapes of torchvision's resnet without fc, from its architecture's rule."""
    found = {}

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (width,)
        found[f"{name}.num_batches_tracked"] = ()

    found["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    entering, deep = 64, depth >= 50
    for stage, count in enumerate(BLOCKS[depth]):
        planes = 64 * 2**stage
        leaving = planes * (4 if deep else 1)
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            kernels = [(planes, 1), (planes, 3), (leaving, 1)] if deep else [(planes, 3)] * 2
            width = entering
            for number, (out, size) in enumerate(kernels, start=1):
                found[f"{name}.conv{number}.weight"] = (out, width, size, size)
                norm(f"{name}.bn{number}", out)
                width = out
            if block == 0 and (stage > 0 or deep):
                found[f"{name}.downsample.0.weight"] = (leaving, entering, 1, 1)
                norm(f"{name}.downsample.1", leaving)
            entering = leaving
    return found


@pytest.mark.parametrize(("depth", "tensors"), [(18, 120), (34, 216), (50, 318), (101, 624)])
def test_batch_norm_backbones_have_torchvisions_names_and_shapes(depth, tensors):
    with torch.device("meta"):
        ours = {
            n: tuple(t.shape) for n, t in ResNetBackbone(ResnetShape(depth)).state_dict().items()
        }
    assert ours == torchvision_names(depth)
    assert len(ours) == tensors


def test_weights_load_strictly_into_monais_own_and_give_its_features():
    torch.manual_seed(0)
    ours = ResNetBackbone(ResnetShape(18)).eval()
    plain = ResNet(
        "basic", [2, 2, 2, 2], [64, 128, 256, 512], spatial_dims=2, conv1_t_stride=2,
        bias_downsample=False, feed_forward=False,
    ).eval()  # fmt: skip
    plain.load_state_dict(ours.state_dict(), strict=True)
    frames = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(frames)[-1].mean(dim=(2, 3)), plain(frames))


@pytest.mark.parametrize("depth", [18, 50])
def test_group_norm_stands_everywhere_and_keeps_samples_apart(depth):
    torch.manual_seed(0)
    network = ResNetBackbone(ResnetShape(depth, norm="group", **TINY))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not list(network.named_buffers())
    frames = torch.randn(3, 3, 64, 64)
    alone = network(frames[:1])[-1]
    torch.testing.assert_close(network(frames)[-1][:1], alone, rtol=1e-4, atol=1e-5)
    maps = network(frames)
    assert [m.shape[1] for m in maps] == list(network.channels)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


def test_per_sample_gradients_equal_a_loop_over_samples():
    torch.manual_seed(0)
    network = ResNetBackbone(ResnetShape(18, norm="group", **TINY)).double()
    parameters = dict(network.named_parameters())
    frames = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def loss(weights, frame):
        return torch.func.functional_call(network, weights, (frame[None],))[-1].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, frames)
    for index, frame in enumerate(frames):
        single = torch.func.grad(loss)(parameters, frame)
        for name, gradient in single.items():
            torch.testing.assert_close(together[name][index], gradient, rtol=1e-9, atol=1e-9)


def pyramid_and_maps():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    channels = (6, 8, 10, 12)
    pyramid = FeaturePyramid(channels, 5).double()
    maps = [
        torch.randn(2, width, side, side, generator=generator, dtype=torch.float64)
        for width, side in zip(channels, (16, 8, 4, 2), strict=True)
    ]
    return pyramid, [each.requires_grad_() for each in maps]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_folded_pooling_equals_pooling_the_dense_map(level):
    pyramid, maps = pyramid_and_maps()
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 5, (2, 8, 8), generator=generator, dtype=torch.uint8)
    labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :3, :3] = 200  # too small to own a cell: an empty mask
    scale = region_pyramid(labels, present_ids(labels), (16, 8, 4, 2))[level]
    weights = pooling_weights(scale, torch.float64)
    dense = weights @ pyramid(maps)[level].flatten(2).transpose(1, 2)
    folded = pyramid.pooled(maps, weights, level)
    torch.testing.assert_close(folded, dense, rtol=0, atol=1e-10)
    assert (scale.cells == 0).any()
    assert folded[scale.cells == 0].abs().max() == 0
    leaves = [*maps, *pyramid.parameters()]
    target = torch.randn(folded.shape, generator=generator, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((dense * target).sum(), leaves, allow_unused=True),
        torch.autograd.grad((folded * target).sum(), leaves, allow_unused=True),
        strict=True,
    )
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10)


def test_what_does_not_fit_is_refused():
    pyramid, maps = pyramid_and_maps()
    with pytest.raises(ShapeError, match="Take the masks of the same scale"):
        pyramid.pooled(maps, torch.ones(2, 3, 16, dtype=torch.float64), 0)
    with pytest.raises(ShapeError, match="Give a ResNet's maps"):
        pyramid(maps[:3])
    with pytest.raises(ShapeError, match="Crop to a multiple of 32"):
        ResNetBackbone(ResnetShape(18, **TINY))(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ShapeError, match=r"Choose a divisor for backbone.groups"):
        ResNetBackbone(ResnetShape(18, width=10, norm="group"))
