"""The pictures show what they say: the same places, the step's own mask, one colouring."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from agssd_core.config import parse_config
from agssd_core.evaluation.features import joint_colours, token_features
from agssd_core.evaluation.panels import StepOfRun, step_panels, unpatchify
from agssd_core.evaluation.pictures import draw_pictures
from agssd_core.evaluation.planes import pair_plane
from agssd_core.losses.reconstruction import patchify
from agssd_core.training import agssd_step
from agssd_core.training.build import build_model
from agssd_core.training.hiding import hide_tokens
from agssd_core.training.site_round import SiteTrainer
from agssd_core.views.batch import make_batch
from agssd_core.views.geometry import ViewBox, affine_box, box_affine

SHAPE = (56, 50, 44)
SITE, TOTAL = "north", 40


@dataclass(frozen=True)
class Info:
    shape: tuple[int, int, int]
    modality: str = "CT"
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    foreground_start: tuple[int, int, int] = (0, 0, 0)
    foreground_step: int = 4

    @property
    def foreground_size(self):
        return self.shape

    @property
    def foreground_integral(self):
        cells = [-(-side // self.foreground_step) for side in self.shape]
        table = np.ones(cells, dtype=np.int64).cumsum(0).cumsum(1).cumsum(2)
        return np.pad(table, ((1, 0), (1, 0), (1, 0)))


class InMemory:
    """Volumes as training reads them, without a cache on disk."""

    def __init__(self, *arrays):
        self.arrays = arrays
        self.infos = tuple(Info(array.shape) for array in arrays)

    def __len__(self):
        return len(self.arrays)

    def read_crop(self, index, start, size):
        axes = [
            np.clip(np.arange(low, low + count), 0, side - 1)
            for low, count, side in zip(start, size, SHAPE, strict=True)
        ]
        return self.arrays[index][np.ix_(*axes)].astype(np.float32)


def ramp(axis):
    """Each voxel's value tells its place along one axis."""
    line = (np.arange(SHAPE[axis]) + 0.5) / SHAPE[axis]
    return np.broadcast_to(np.expand_dims(line, [a for a in range(3) if a != axis]), SHAPE)


def noise(seed):
    return np.random.default_rng(seed).random(SHAPE)


def settings(**changes):
    agssd = {"augment": {"enabled": False}, **changes}
    return parse_config({"preset": "tiny", "training": {"batch_size": 3}, "agssd": agssd})


def at_step(step=7):
    return StepOfRun(seed=0, site=SITE, step=step, total_steps=TOTAL, batch_size=3)


def panels_of(volumes, config, *, step=7, model=None):
    model = model or build_model(config.agssd, seed=0)
    return step_panels(model, volumes, agssd=config.agssd, at=at_step(step), count=3)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_drawn_overlap_is_the_same_place_in_the_volume_and_in_both_crops(axis):
    """In the drawn rectangles the ramp reads the same coordinates, flipped views included."""
    config = settings()
    flips = set()
    for step in range(6):
        for found in panels_of(InMemory(ramp(axis)), config, step=step):
            shared = found.plane.shared
            wanted = sorted(
                (
                    shared.start[axis] / SHAPE[axis],
                    (shared.start[axis] + shared.size[axis]) / SHAPE[axis],
                )
            )
            flips |= set(found.plane.flipped)
            for view in range(2):
                box = found.plane.shared_in_view[view]
                line = found.clean[view][:, 5] if axis == 0 else found.clean[view][5]
                edges = [box.start[axis], box.start[axis] + box.size[axis]]
                read = np.interp(np.asarray(edges) - 0.5, np.arange(len(line)), line)
                # A rectangle may end half a voxel beyond the last voxel's centre.
                assert sorted(read) == pytest.approx(wanted, abs=0.8 / SHAPE[axis])
    assert flips == {True, False}


def test_both_crops_show_the_same_plane_within_a_voxel():
    for step in range(6):
        for found in panels_of(InMemory(ramp(2)), settings(), step=step):
            place = found.plane.position / SHAPE[2]
            for view in range(2):
                assert found.clean[view] == pytest.approx(place, abs=1.0 / SHAPE[2])
            assert found.volume_plane == pytest.approx(place, abs=0.5 / SHAPE[2] + 1e-6)


def test_corresponding_voxels_of_the_overlap_have_equal_values():
    """Each voxel of view 1 inside the drawn overlap is looked up in view 2 by the affines."""
    config = settings()
    volumes = InMemory(ramp(0) * 0.6 + ramp(1) * 0.4)
    found = panels_of(volumes, config)[0]
    batch = make_batch(volumes, config.agssd, seed=0, site=SITE, step=7, batch_size=3)
    first, second = batch.affine_g[:, 0].numpy()
    size = found.clean[0].shape[0]
    box, other = found.plane.shared_in_view
    compared = 0
    for d in range(int(np.ceil(box.start[0])), int(box.start[0] + box.size[0])):
        for h in range(int(np.ceil(box.start[1])), int(box.start[1] + box.size[1])):
            frame = np.array([(d + 0.5) / size * 2 - 1, (h + 0.5) / size * 2 - 1, 0, 1])
            there = (np.linalg.inv(second) @ first @ frame)[:2]
            place = (there + 1) / 2 * size
            assert (place >= np.asarray(other.start) - 1e-6).all()
            assert (place <= np.asarray(other.start) + np.asarray(other.size) + 1e-6).all()
            near = np.clip(place.astype(int), 0, size - 1)
            assert found.clean[1][tuple(near)] == pytest.approx(found.clean[0][d, h], abs=0.03)
            compared += 1
    assert compared > 50


def test_views_without_overlap_are_drawn_without_one():
    pair = [
        ViewBox((0, 0, 0), (10, 10, 10)),
        ViewBox((30, 30, 30), (10, 10, 10), (True, False, False)),
    ]
    plane = pair_plane(np.stack([box_affine(box) for box in pair]), (32, 32, 32))
    assert plane.shared is None
    assert plane.shared_in_view is None
    assert plane.flipped == (False, True)


def test_the_mask_drawn_is_the_mask_of_the_step(monkeypatch):
    config = settings()
    volumes = InMemory(noise(1), noise(2), noise(3))
    trainer = SiteTrainer(config, volumes, site=SITE)
    trainer.train_steps(0, 2, TOTAL)  # a density has been seen, so the ratio adapts
    shown = panels_of(volumes, config, step=2, model=trainer.learner.model)

    masks = []

    def record(*args, **kwargs):
        hiding = hide_tokens(*args, **kwargs)
        masks.append(hiding.hidden.mask)
        return hiding

    monkeypatch.setattr(agssd_step, "hide_tokens", record)
    trainer.train_steps(2, 1, TOTAL)
    batch = make_batch(volumes, config.agssd, seed=0, site=SITE, step=2, batch_size=3)
    (mask,) = masks
    for panels in shown:
        place = batch.volume_index.tolist().index(panels.volume_index)
        for view in range(2):
            layer = mask[view, place].view(4, 4, 4)[:, :, panels.plane.slices[view] // 8]
            assert np.array_equal(panels.hidden[view], layer.numpy())
            share = float(mask[view, place].float().mean())
            assert panels.hidden_share[view] == pytest.approx(share)


def test_the_prediction_replaces_hidden_voxels_only():
    config = settings()
    for panels in panels_of(InMemory(noise(4)), config):
        for view in range(2):
            hidden = np.kron(panels.hidden[view], np.ones((8, 8))).astype(bool)
            kept = panels.prediction[view] == panels.clean[view]
            assert kept[~hidden].all()
            assert not kept[hidden].any()
            assert np.isnan(panels.error[view][~hidden]).all()
            wrong = np.abs(panels.prediction[view] - panels.clean[view])[hidden]
            assert panels.error[view][hidden] == pytest.approx(wrong)


def test_a_prediction_of_normalised_patches_is_shown_in_units_of_the_scan():
    """With a decoder that returns 0 each hidden patch is drawn at its own mean."""
    config = settings(loss={"norm_pix": True})
    model = build_model(config.agssd, seed=0)
    with torch.no_grad():
        model.student.decoder.out.weight.zero_()
        model.student.decoder.out.bias.zero_()
    volumes = InMemory(noise(5))
    panels = panels_of(volumes, config, model=model)[0]
    drawn = panels.prediction[0][np.kron(panels.hidden[0], np.ones((8, 8))).astype(bool)]
    assert 0.3 < drawn.min() < drawn.max() < 0.7


def test_unpatchify_undoes_patchify():
    crops = torch.rand(2, 1, 16, 24, 8)
    assert torch.equal(unpatchify(patchify(crops, 8), (2, 3, 1), 8), crops)


def test_colours_are_fitted_once_over_student_and_teacher():
    tokens = torch.randn(2, 4, 12)
    moved = tokens + 3 * torch.randn(12)
    same_student, same_teacher, _ = joint_colours(tokens, tokens)
    assert np.array_equal(same_student, same_teacher)
    student, teacher, held = joint_colours(tokens, moved)
    assert np.abs(student.mean((0, 1)) - teacher.mean((0, 1))).max() > 0.3
    assert 0 < held <= 1
    assert student.min() >= 0
    assert teacher.max() <= 1


def test_equal_features_get_equal_colours_in_both_networks():
    tokens = torch.randn(2, 5, 8)
    other = torch.randn(2, 5, 8)
    other[1, 3] = tokens[0, 2]
    student, teacher, _ = joint_colours(tokens, other)
    assert teacher[1, 3] == pytest.approx(student[0, 2])


def test_features_are_those_of_eval_mode_and_modes_are_put_back():
    config = settings(model={"drop_path": 0.9})
    model = build_model(config.agssd, seed=0).train()
    crops = torch.rand(2, 1, 1, 32, 32, 32)
    one, two = token_features(model, crops), token_features(model, crops)
    assert torch.equal(one.student, two.student)
    assert torch.equal(one.teacher, one.student)  # at the start the teacher is a copy
    assert model.student.training
    assert not model.teacher.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_four_pictures_of_a_volume_are_png_files_with_words():
    pictures = draw_pictures(panels_of(InMemory(noise(6)), settings())[0])
    assert [picture.name for picture in pictures] == ["pair", "mask", "reconstruction", "tokens"]
    for picture in pictures:
        image = Image.open(BytesIO(picture.png))
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(picture.text) > 60


def test_the_picture_marks_the_overlap_where_the_numbers_say():
    """The dashed yellow rectangle is found again in the pixels of the first crop."""
    panels = panels_of(InMemory(np.zeros(SHAPE)), settings())[0]
    pixels = np.asarray(Image.open(BytesIO(draw_pictures(panels)[0].png)).convert("RGB")).astype(
        int
    )
    blue = np.argwhere((np.abs(pixels - (0, 0x72, 0xB2)) < 30).all(axis=-1))
    right = blue[blue[:, 1] > pixels.shape[1] * 0.34]  # the frame of view 1
    (top, left), (bottom, last) = right.min(axis=0), right.max(axis=0)
    inside = pixels[top + 4 : bottom - 3, left + 4 : last - 3]
    tinted = np.argwhere(inside[..., 0] - inside[..., 2] > 15)
    (low_row, low_column), (high_row, high_column) = tinted.min(axis=0), tinted.max(axis=0)
    box, size = panels.plane.shared_in_view[0], panels.clean[0].shape
    rows, columns = inside.shape[:2]
    wanted = [
        (1 - (box.start[1] + box.size[1]) / size[1]) * rows,
        (1 - (box.start[0] + box.size[0]) / size[0]) * columns,
        (1 - box.start[1] / size[1]) * rows,
        (1 - box.start[0] / size[0]) * columns,
    ]
    assert [low_row, low_column, high_row, high_column] == pytest.approx(wanted, abs=6)


def test_boxes_on_the_volume_are_those_of_the_batch():
    config = settings()
    volumes = InMemory(noise(7))
    panels = panels_of(volumes, config)[0]
    batch = make_batch(volumes, config.agssd, seed=0, site=SITE, step=7, batch_size=3)
    for view in range(2):
        box = affine_box(batch.affine_g[view, 0].numpy())
        assert panels.plane.boxes[view].start == pytest.approx(box.start[:2])
        assert panels.plane.boxes[view].size == pytest.approx(box.size[:2])
    assert panels.overlap == pytest.approx(float(batch.overlap[0]))
