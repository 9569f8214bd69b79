import numpy as np
import pytest
import torch

from agssd_core.config.lpsam import LpsamAugmentConfig, LpsamConfig
from agssd_core.errors import ShapeError, TrainingError
from agssd_core.evaluation.delineation import delineate_frames, structure_dice
from agssd_core.losses.delineation import prompted_loss
from agssd_core.models.lpsam import LpSam, LpsamShape
from agssd_core.models.lpsam_input import (
    MEAN,
    STD,
    network_input,
    pad_masks,
    restore_masks,
    shrink_frame,
)
from agssd_core.training import lpsam_fit
from agssd_core.training.lpsam_fit import batch_numbers, build_lpsam, fit_lpsam, latent_step
from agssd_core.training.lpsam_frames import (
    Change,
    FitFrame,
    apply_change,
    draw_change,
    draw_prompts,
    fit_frame,
)
from agssd_core.views.seeds import rng_for
from tests.support.lpsam import QUICK, SHORT, ellipse_frame, empty_frame


def test_shapes_of_the_small_network():
    network, _ = build_lpsam(QUICK, seed=0)
    logits, iou = network(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 3, 32, 32)
    assert iou.shape == (2, 3)
    with pytest.raises(ShapeError, match="Resize and pad"):
        network(torch.zeros(2, 3, 48, 64))


def test_the_released_form_is_one_region_of_two_tokens():
    network, _ = build_lpsam(QUICK.model_copy(update={"regions": 1}), seed=0)
    images = torch.randn(1, 3, 64, 64)
    embedding = network.encode(images)
    sparse = network.latent_prompts(images, embedding)
    assert sparse.shape == (1, 1, 2, 64)
    # Both tokens enter one decoder call and give one mask.
    logits, iou = network.decode(embedding, sparse)
    assert (logits.shape, iou.shape) == ((1, 1, 32, 32), (1, 1))


def test_prompts_of_one_call_do_not_see_each_other():
    network, _ = build_lpsam(QUICK, seed=0)
    embedding = network.encode(torch.randn(2, 3, 64, 64))
    sparse = torch.randn(2, 3, 2, 64)
    together, iou = network.decode(embedding, sparse)
    for region in range(3):
        alone, one = network.decode(embedding, sparse[:, region : region + 1])
        torch.testing.assert_close(together[:, region], alone[:, 0])
        torch.testing.assert_close(iou[:, region], one[:, 0])


@pytest.mark.parametrize("window", [14, 16])
def test_any_window_fits_the_grid(window):
    shape = LpsamShape(
        image_size=160, width=64, depth=2, heads=2, window=window, global_blocks=(1,), channels=32,
        decoder_mlp=32, stem=4, regions=1, blocks=1,
    )  # fmt: skip
    assert LpSam(shape)(torch.zeros(1, 3, 160, 160))[0].shape == (1, 1, 80, 80)


def test_input_is_normalised_as_sam_does_and_padded_below():
    frame = np.full((32, 64), 200, dtype=np.uint8)
    images = network_input([shrink_frame(frame, 64)], 64)
    for channel in range(3):
        expected = (200 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(images[0, channel, :32], torch.full((32, 64), expected))
    assert images[0, :, 32:].abs().max() == 0


def test_masks_come_back_where_they_were():
    frame = ellipse_frame(0, (60, 100))
    padded = pad_masks(fit_frame(frame, 64).structures, 64)
    restored = restore_masks(padded.float() * 2 - 1, (60, 100), 64) > 0
    for found, truth in zip(restored.numpy(), frame.structures, strict=True):
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert dice > 0.93


def test_pixels_and_masks_are_moved_together():
    mask = torch.zeros(40, 64, dtype=torch.bool)
    mask[8:20, 10:30] = True
    frame = FitFrame((mask * 255).to(torch.uint8), mask[None])
    for step in range(20):
        change = draw_change(rng_for(0, "test", step), LpsamAugmentConfig(p=1.0))
        plain = Change(change.angle, change.scale, change.centre, flip=change.flip)
        grey, structures = apply_change(frame, plain)
        assert ((grey > 0.5) == structures[0]).float().mean() > 0.98


def test_a_turn_keeps_area_and_centre_and_does_not_shear():
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[22:42, 38:58] = True  # centred
    frame = FitFrame((mask * 255).to(torch.uint8), mask[None])
    turned = apply_change(frame, Change(angle=90))[1][0]
    assert torch.equal(turned, mask)
    turned = apply_change(frame, Change(angle=30))[1][0]
    assert turned.sum().item() == pytest.approx(400, rel=0.03)
    mirrored = apply_change(frame, Change(angle=30, flip=True))[1][0]
    assert mirrored.sum().item() == pytest.approx(400, rel=0.03)
    grown = apply_change(frame, Change(scale=1.5))[1][0]
    assert grown.sum().item() == pytest.approx(900, rel=0.05)
    flipped = apply_change(FitFrame(frame.grey, mask.roll(9, 1)[None]), Change(flip=True))[1][0]
    assert torch.equal(flipped, mask.roll(9, 1).flip(1))


def test_clicks_lie_inside_and_boxes_around_their_structures():
    structures = [torch.zeros(3, 64, 64, dtype=torch.bool), torch.zeros(1, 64, 64).bool()]
    structures[0][0, 4:9, 5:20] = structures[0][1, 30:40, 30:50] = True
    structures[0][2, 50, 60] = structures[1][0, 10:20, 10:20] = True
    boxed = set()
    for step in range(10):
        prompts, chosen = draw_prompts(structures, rng_for(0, "prompts", step))
        assert prompts.points.shape == (2, 3, 2)
        assert sorted(chosen[0]) == [0, 1, 2]
        assert chosen[1] == [0]
        for frame, picks in enumerate(chosen):
            for place, structure in enumerate(picks):
                column, row = prompts.points[frame, place].long().tolist()
                assert structures[frame][structure, row, column]
                left, top, right, bottom = prompts.boxes[frame, place].tolist()
                assert left - 1.5 < column < right + 1.5
                assert top - 1.5 < row < bottom + 1.5
        boxed |= set(prompts.use_box.flatten().tolist())
    assert boxed == {True, False}


def test_every_frame_comes_once_in_a_pass():
    seen = [n for step in range(5) for n in batch_numbers(10, 4, seed=1, step=step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_prompted_loss_wants_one_structure_a_prompt():
    masks = torch.zeros(2, 8, 8).bool()
    masks[0, :4], masks[1, 4:] = True, True
    logits = (masks.float() * 2 - 1) * 20
    assert prompted_loss(logits, torch.ones(2), masks).item() == pytest.approx(0, abs=1e-4)
    assert prompted_loss(logits.flip(0), torch.ones(2), masks).item() > 5
    with pytest.raises(ShapeError, match="one structure a prompt"):
        prompted_loss(logits, torch.ones(2), masks[:1])


def _state(network):
    return {name: item.clone() for name, item in network.state_dict().items()}


@pytest.mark.parametrize("pretrained", [True, False])
def test_each_stage_moves_what_it_should_and_not_one_bit_else(pretrained, monkeypatch):
    frames = [fit_frame(ellipse_frame(n), 64) for n in range(4)]
    start = _state(build_lpsam(SHORT, seed=0)[0])
    config = SHORT
    if pretrained:
        monkeypatch.setattr("agssd_core.training.lpsam_fit.load_sam", lambda *_, **__: "0" * 64)
        config = SHORT.model_copy(update={"weights": "somewhere", "window": 16})
    without_engine = config.model_copy(
        update={"engine": config.engine.model_copy(update={"steps": 0})}
    )
    middle = _state(fit_lpsam(frames, without_engine, seed=0)[0])
    end = _state(fit_lpsam(frames, config, seed=0)[0])

    def moved(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    first, second = moved(start, middle), moved(middle, end)
    assert {name.split(".")[0] for name in second} == {"engine", "mask_decoder"}
    adapters = ("encoder.stem.", "encoder.position_down.", "encoder.input_adapter.", "encoder.ada")
    assert any(name.startswith(adapters) for name in first)
    assert not any(name.startswith("engine.") for name in first)
    fixed = {name for name in first if not name.startswith(adapters)}
    if pretrained:
        assert fixed == {
            f"encoder.layers.{block}.attn.rel_pos_{axis}" for block in (1, 3) for axis in "hw"
        }
    else:
        assert "encoder.patch_embed.weight" in fixed
        assert "prompt_encoder.shared_embedding.positional_embedding" not in first


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    frames = [fit_frame(ellipse_frame(n), 64) for n in range(4)]
    one, other, third = (_state(fit_lpsam(frames, SHORT, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_a_loss_that_is_not_finite_ends_the_fit():
    frames = [fit_frame(ellipse_frame(0), 64)]
    network, _ = build_lpsam(SHORT, seed=0)
    with torch.no_grad():
        network.mask_decoder.iou_token.weight.fill_(float("nan"))
    loss = latent_step(network, frames, rng_for(0, "x"), SHORT)
    before = _state(network)
    optimiser = torch.optim.Adam(network.parameters())
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        lpsam_fit._take_step(loss, optimiser, list(network.parameters()))
    after = _state(network)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_nothing_to_fit_on_is_said():
    with pytest.raises(TrainingError, match="Add masks"):
        fit_lpsam([fit_frame(empty_frame(0), 64)], SHORT, seed=0)


@pytest.fixture(scope="module")
def fitted():
    frames = [fit_frame(ellipse_frame(n), 64) for n in range(24)]
    frames += [fit_frame(empty_frame(n), 64) for n in range(4)]
    return fit_lpsam(frames, QUICK, seed=0)


def _dice(network, *, prompts=None, config: LpsamConfig = QUICK, iou=None):
    held_out = [ellipse_frame(n) for n in range(100, 112)]
    rules = config.rules if iou is None else config.rules.model_copy(update={"iou": iou})
    found = delineate_frames(
        network, [f.frame for f in held_out], [f.sector for f in held_out], rules, prompts=prompts
    )
    return float(
        np.mean(
            [
                structure_dice(delineation.labels, frame.structures)
                for delineation, frame in zip(found, held_out, strict=True)
            ]
        )
    )


def test_fitting_finds_both_anatomies_and_beats_its_controls(fitted):
    network, record = fitted
    for stage in ("adapters", "engine"):
        losses = [loss for _, loss in record.curve[stage]]
        assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5]), stage
    untrained, _ = build_lpsam(QUICK, seed=0)
    random = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    ours = _dice(network)
    # Controls may even leave out the threshold of the predicted IoU.
    controls = [_dice(untrained, iou=0.0), _dice(network, prompts=random, iou=0.0)]
    assert ours > 0.6, (ours, controls)
    assert ours > max(controls) + 0.1, (ours, controls)
    assert record.parameters["engine"] > 0


def test_an_empty_frame_has_few_labels(fitted):
    frames = [empty_frame(n) for n in range(50, 56)]
    found = delineate_frames(
        fitted[0], [f.frame for f in frames], [f.sector for f in frames], QUICK.rules
    )
    assert np.mean([(item.labels > 0).mean() for item in found]) < 0.05
