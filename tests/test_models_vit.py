"""The encoder: MONAI's arithmetic, positions at any grid, masking, stochastic depth."""

import warnings

import pytest
import torch
from monai.networks.nets import ViT
from torch.nn import functional as F

from agssd_core.errors import ShapeError
from agssd_core.models.blocks import draw_keep
from agssd_core.models.student_teacher import AgssdNetwork
from agssd_core.models.tokens import PosEmbed, sincos_positions
from agssd_core.models.vit3d import VisionTransformer3d
from tests.support.models import randomised, tiny_shape, tiny_vit


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return VisionTransformer3d(tiny_vit(**changes))


def crops(count=3, side=16, seed=1):
    return torch.rand(count, 1, side, side, side, generator=torch.Generator().manual_seed(seed))


def masks(count=3, hidden=40, tokens=64, seed=2):
    order = torch.rand(count, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < hidden


def test_m1_tokens_are_those_of_monai_blocks_written_out():
    ours = encoder()
    theirs = ViT(1, (16,) * 3, (4,) * 3, 24, 96, 2, 4, qkv_bias=True, classification=True)
    with torch.no_grad():
        theirs.patch_embedding.patch_embeddings.load_state_dict(ours.patch_embed.state_dict())
        theirs.patch_embedding.position_embeddings.copy_(ours.pos_embed.weight)
        theirs.cls_token.copy_(ours.cls_token.weight)
        theirs.blocks.load_state_dict(ours.blocks.state_dict(), strict=False)
        theirs.norm.load_state_dict(ours.norm.state_dict())
        cls, tokens = ours.forward_features(crops())
        expected = theirs.norm(theirs(crops())[1][-1])
    torch.testing.assert_close(torch.cat([cls[:, None], tokens], 1), expected, atol=1e-5, rtol=0)


def test_m3_positions_are_untouched_at_the_native_grid_and_trilinear_elsewhere():
    positions = PosEmbed((4, 4, 4), 12)
    assert positions.at((4, 4, 4)) is positions.weight
    cube = positions.weight.transpose(1, 2).reshape(1, 12, 4, 4, 4)
    expected = F.interpolate(cube, size=(2, 3, 5), mode="trilinear", align_corners=False)
    torch.testing.assert_close(positions.at((2, 3, 5)), expected.flatten(2).transpose(1, 2))


def test_m3_interpolated_positions_keep_their_axes():
    positions = PosEmbed((4, 4, 4), 3)
    axes = torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")
    with torch.no_grad():
        positions.weight.copy_(torch.stack(axes, dim=-1).reshape(1, 64, 3))
    found = positions.at((2, 2, 2)).reshape(2, 2, 2, 3)
    # Halving the grid averages neighbouring tokens: 0.5 and 2.5 along each axis.
    assert found[1, 0, 0].tolist() == pytest.approx([2.5, 0.5, 0.5])
    assert found[0, 0, 1].tolist() == pytest.approx([0.5, 0.5, 2.5])


def test_m3_local_and_non_cubic_crops_are_encoded():
    ours = encoder()
    assert ours.forward_features(crops(side=8))[1].shape == (3, 8, 24)
    assert ours.forward_features(torch.rand(2, 1, 8, 16, 20))[1].shape == (2, 2 * 4 * 5, 24)


@pytest.mark.parametrize("shape", [(1, 1, 18, 16, 16), (1, 1, 16, 16, 2)], ids=str)
def test_a_crop_that_does_not_divide_into_patches_is_refused(shape):
    with pytest.raises(ShapeError, match="Choose a crop size that is"):
        encoder().forward_features(torch.zeros(shape))


def test_fixed_positions_are_monais_but_neither_trained_nor_saved():
    from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MONAI calls meshgrid without indexing
        expected = build_sincos_position_embedding([2, 3, 4], 12)
    torch.testing.assert_close(sincos_positions((2, 3, 4), 12), expected.data)
    fixed = encoder(pos_embed="sincos")
    names = [*fixed.state_dict(), *dict(fixed.named_parameters())]
    assert not any("pos_embed" in name for name in names)
    assert "pos_embed.weight" in dict(encoder().named_parameters())


def test_m4_fused_and_plain_attention_agree():
    fused, plain = encoder(), encoder(plain_attention=True)
    plain.load_state_dict(fused.state_dict())
    assert [b.attn.use_flash_attention for b in (*fused.blocks, *plain.blocks)] == [True] * 2 + [
        False
    ] * 2
    for one, other in zip(fused(crops()), plain(crops()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_hidden_tokens_leave_no_trace_of_their_voxels():
    ours, mask = encoder(), masks()
    x = crops()
    hidden = mask.reshape(3, 1, 4, 4, 4).float()
    hidden = F.interpolate(hidden, scale_factor=4, mode="nearest").bool()
    damaged = torch.where(hidden, torch.rand_like(x), x)
    for one, other in zip(
        ours.forward_features(x, mask), ours.forward_features(damaged, mask), strict=True
    ):
        assert torch.equal(one, other)
    assert not torch.equal(ours(x)[0], ours(damaged)[0])


def test_the_mask_token_is_replaced_before_positions_are_added():
    ours = encoder(depth=1)
    everything = torch.ones(3, 64, dtype=torch.bool)
    queries = ours.mask_queries(everything, (4, 4, 4))
    expected = ours.mask_token.weight + ours.pos_embed.weight
    torch.testing.assert_close(queries, expected.expand(3, -1, -1))
    _, tokens = ours.forward_features(crops(), everything)
    assert tokens.std(dim=1).min() > 0  # all hidden, yet each knows its place


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ShapeError, match="on the token grid of these crops"):
        encoder().forward_features(crops(side=8), masks())


def test_dropping_encodes_exactly_the_visible_tokens():
    ours, mask = encoder(), masks()
    cls, visible = ours.forward_visible(crops(), mask)
    assert visible.shape == (3, 24, 24)
    # With nothing hidden, dropping and replacing are the same thing.
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(ours.forward_visible(crops(), nothing), ours(crops()))
    assert not torch.allclose(cls, ours(crops())[0])


def test_dropping_needs_equal_counts():
    mask = masks()
    mask[0, mask[0].nonzero()[0]] = False
    with pytest.raises(ShapeError, match="Use one mask ratio per batch"):
        encoder().forward_visible(crops(), mask)


def test_dropped_tokens_are_recovered_at_their_own_places():
    torch.manual_seed(0)
    network = AgssdNetwork(tiny_shape(masking="drop"), student=True)
    mask = masks()
    cls, tokens = network.encode(crops(), mask)
    alone, visible = network.encoder.forward_visible(crops(), mask)
    assert torch.equal(cls, alone)
    assert torch.equal(tokens[~mask], visible.flatten(0, 1))
    queries = network.encoder.mask_queries(mask, (4, 4, 4))
    predicted = network.predictor(queries, visible, mask)[mask].reshape(3, 40, 24)
    turned = queries.flip(1)
    again = network.predictor(turned, visible, mask)[mask].reshape(3, 40, 24)
    torch.testing.assert_close(predicted, again.flip(1))
    tokens.sum().backward()
    assert network.encoder.mask_token.weight.grad.abs().sum() > 0


def test_stochastic_depth_is_per_sample_scaled_and_seeded():
    rates = torch.tensor([0.0, 0.25, 0.5])
    keep = draw_keep(rates, 4000, generator=torch.Generator().manual_seed(0))
    assert keep.shape == (3, 2, 4000)
    for layer, rate in enumerate(rates.tolist()):
        torch.testing.assert_close(keep[layer].unique()[-1].item(), 1 / (1 - rate))
        assert keep[layer].mean().item() == pytest.approx(1, abs=0.04)
    assert (keep[0] == 1).all()
    assert torch.equal(keep, draw_keep(rates, 4000, generator=torch.Generator().manual_seed(0)))


def test_stochastic_depth_acts_only_in_training_and_only_through_its_generator():
    ours = encoder(drop_path=0.5).train()

    def run(seed):
        return ours.forward_features(crops(), generator=torch.Generator().manual_seed(seed))[1]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(5))
    still = torch.get_rng_state()
    run(0)
    assert torch.equal(torch.get_rng_state(), still)
    ours.eval()
    assert torch.equal(run(0), run(5))
    # Rate 0 draws nothing at all.
    torch.testing.assert_close(run(0), encoder().train()(crops())[1])


def test_a_sample_whose_branches_are_dropped_passes_through():
    block = randomised(encoder().blocks[0])
    tokens = torch.randn(3, 5, 24)
    keep = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    out = block(tokens, keep)
    assert torch.equal(out[0], tokens[0])
    torch.testing.assert_close(out[1], block(tokens)[1])
    attended = tokens[2:] + 2 * block.attn(block.norm1(tokens[2:]))
    torch.testing.assert_close(out[2:], attended + 2 * block.mlp(block.norm2(attended)))


def test_activation_checkpointing_changes_no_bit():
    grads = []
    for option in (False, True):
        ours = encoder(drop_path=0.3, activation_checkpointing=option).train()
        cls, tokens = ours.forward_features(
            crops(), masks(), generator=torch.Generator().manual_seed(3)
        )
        (cls.sum() + tokens.square().sum()).backward()
        grads.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_every_parameter_gets_a_gradient():
    ours = encoder()
    cls, tokens = ours.forward_features(crops(), masks())
    (cls.square().sum() + tokens.square().sum()).backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []
