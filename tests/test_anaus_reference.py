"""The whole objective against dense maps and plain loops; what a step moves, and when."""

import math

import pytest
import torch

from agssd_core.errors import TrainingError
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.anaus_step import draw_regions, loss_terms, train_step
from agssd_core.views.us_batch import make_us_batch
from tests.support.us import MemoryFrames, as_type, plain_terms, us_config, us_learner


def batch_of(config, *, frames=None, step=0, dtype=torch.float32):
    found = make_us_batch(
        frames or MemoryFrames(),
        config.anaus,
        seed=config.seed,
        site="a",
        step=step,
        batch_size=config.anaus.batch_size,
    )
    return as_type(found, dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"regions": {"per_view": 2}}, {"regions": {"scales": [4, 16], "sampling": "uniform"}}],
    ids=["pooled-once", "more-anatomies-than-draws", "two-scales"],
)
def test_losses_equal_dense_maps_and_plain_loops(norm, changes):
    """Same weights, masks and drawn ids: value to 1e-6, gradients to 1e-5 relative (float64)."""
    config = us_config(anaus={"backbone": {"norm": norm}, "batch_size": 3, **changes})
    batch = batch_of(config, dtype=torch.float64)
    regions = draw_regions(batch, config.anaus, generator())
    found = []
    for plain in (False, True):
        learner = us_learner(config, dtype=torch.float64)
        if plain:
            align, context = plain_terms(learner.pair, batch, regions, config.anaus)
        else:
            terms = loss_terms(learner, batch, regions)
            align, context = terms.align, terms.context
        (align + context).backward()
        grads = {n: p.grad for n, p in learner.pair.student.named_parameters()}
        found.append((align.item(), context.item(), grads))
    (align, context, ours), (plain_align, plain_context, plain_grads) = found
    assert align == pytest.approx(plain_align, abs=1e-6)
    assert context == pytest.approx(plain_context, abs=1e-6)
    assert align > 0
    assert context > 0
    for name, grad in ours.items():
        reference = plain_grads[name]
        if reference is None or grad is None:
            assert reference is grad is None, name
            continue
        assert (grad - reference).norm() <= 1e-5 * reference.norm() + 1e-12, name


def test_row_7_of_the_deviations_student_and_teacher_share_the_drawn_ids():
    """Of a pair that are equal, undamaged overlaps cost nothing but the predictor's difference."""
    config = us_config(anaus={"backbone": {"norm": "group"}})
    learner = us_learner(config, dtype=torch.float64)
    learner.pair.student.predictor = None  # the student is then the teacher
    batch = batch_of(config, dtype=torch.float64)
    batch.damaged = batch.clean.clone()
    regions = draw_regions(batch, config.anaus, generator())
    assert loss_terms(learner, batch, regions).context.item() == 0


def test_row_8_the_overlap_is_pooled_by_its_own_geometry():
    config = us_config()
    batch = batch_of(config)
    regions = draw_regions(batch, config.anaus, generator())
    side = regions[-1].scale
    block = batch.overlap_labels.shape[-1] // side
    labels = batch.overlap_labels[0].view(side, block, side, block).transpose(1, 2).flatten(2)
    winners = torch.mode(labels.long().flatten(0, 1), dim=1).values
    ids = regions[-1].overlap.ids[0][regions[-1].overlap.owner[0].flatten()]
    assert (ids == winners).float().mean() > 0.95  # ties apart


def test_row_3_one_pass_of_the_backbone_for_each_set_of_images():
    config = us_config()
    learner = us_learner(config)
    seen = []
    for network in (learner.pair.student, learner.pair.teacher):
        network.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = batch_of(config)
    loss_terms(learner, batch, draw_regions(batch, config.anaus, generator()))
    frames = config.anaus.batch_size
    assert sorted(seen) == [frames, frames, 2 * frames, 2 * frames]


def test_row_11_a_frame_without_overlap_adds_nothing():
    config = us_config(anaus={"backbone": {"norm": "group"}})
    batch = batch_of(config)
    batch.valid[:] = True
    regions = draw_regions(batch, config.anaus, generator())
    learner = us_learner(config)
    batch.valid[1:] = False
    only_first = loss_terms(learner, batch, regions).context
    batch.damaged[1:] = torch.rand_like(batch.damaged[1:])
    assert torch.equal(loss_terms(learner, batch, regions).context, only_first)
    batch.valid[:] = False
    assert loss_terms(learner, batch, regions).context.item() == 0


def test_row_5_the_teacher_moves_once_and_after_the_student():
    config = us_config()
    learner = us_learner(config)
    before = learner.pair.shared_weights()
    result = train_step(
        learner, batch_of(config), learning_rate=0.5, ema_momentum=0.75, generator=generator()
    )
    after = learner.pair.shared_weights()
    assert math.isfinite(float(result.loss))
    moved = [n for n in before if n.startswith("student/") and (before[n] != after[n]).any()]
    assert len(moved) > 20
    for name in before:
        if name.startswith("teacher/"):
            student = after[name.replace("teacher/", "student/")]
            expected = 0.75 * before[name] + 0.25 * student
            assert abs(after[name] - expected).max() < 1e-5, name


def test_a_term_of_weight_0_is_not_computed():
    for loss, least in (({"align": 0}, "context"), ({"context": 0}, "align")):
        config = us_config(anaus={"loss": loss})
        batch = batch_of(config)
        terms = loss_terms(
            us_learner(config), batch, draw_regions(batch, config.anaus, generator())
        )
        other = {"align": "context", "context": "align"}[least]
        assert getattr(terms, least).item() > 0
        assert getattr(terms, other).item() == 0


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_step_that_is_not_finite_moves_nothing(norm):
    config = us_config(anaus={"backbone": {"norm": norm}})
    learner = us_learner(config)
    before = learner.pair.shared_weights()
    batch = batch_of(config)
    batch.views[0, 0, 0, 5, 5] = torch.nan
    with pytest.raises(TrainingError, match=r"Lower anaus.optimiser.learning_rate"):
        train_step(learner, batch, learning_rate=0.5, ema_momentum=0.9, generator=generator())
    after = learner.pair.shared_weights()
    assert all((before[name] == after[name]).all() for name in before)


def test_frames_without_any_anatomy_give_a_loss_of_0_and_no_error():
    config = us_config()
    frames = MemoryFrames(labels=False)
    learner = us_learner(config)
    result = train_step(
        learner,
        batch_of(config, frames=frames),
        learning_rate=0.5,
        ema_momentum=0.9,
        generator=generator(),
    )
    assert result.loss.item() == 0
    assert result.anatomies.item() == 0


def test_round_0_weights_are_the_seeds_and_the_teacher_is_a_copy():
    anaus = us_config().anaus
    one, same, other = (build_pair(anaus, seed=seed).shared_weights() for seed in (0, 0, 1))
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)
    for name in one:
        if name.startswith("teacher/"):
            assert (one[name] == one[name.replace("teacher/", "student/")]).all()
    assert not any(name.startswith("state/") for name in one)


def test_shared_statistics_are_means_and_second_moments():
    config = us_config(anaus={"share_statistics": True})
    learner = us_learner(config)
    train_step(
        learner, batch_of(config), learning_rate=0.1, ema_momentum=0.9, generator=generator()
    )
    weights = learner.pair.shared_weights()
    norm = learner.pair.teacher.backbone.bn1
    mean = weights["state/statistics.teacher.backbone.bn1.mean"]
    square = weights["state/statistics.teacher.backbone.bn1.square"]
    assert mean == pytest.approx(norm.running_mean.numpy(), abs=1e-6)
    assert square - mean**2 == pytest.approx(norm.running_var.numpy(), abs=1e-5)
    fresh = build_pair(config.anaus, seed=5)
    fresh.load_shared_weights(weights)
    assert torch.allclose(fresh.teacher.backbone.bn1.running_var, norm.running_var, atol=1e-5)
    trained = norm.running_mean.clone()
    weights["state/statistics.teacher.backbone.bn1.mean"] = mean + 1
    learner.pair.load_shared_weights(weights)
    assert torch.equal(norm.running_mean, trained)  # a site that has trained keeps its own
