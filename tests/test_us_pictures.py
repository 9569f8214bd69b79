"""The ultrasound pictures show what they say: the step's own views, the overlap, the features."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from agssd_core.evaluation.drawing import SHARED
from agssd_core.evaluation.panels import StepOfRun
from agssd_core.evaluation.us_panels import frame_panels
from agssd_core.evaluation.us_pictures import (
    draw_frame_pictures,
    label_colours,
    sources_in_words,
)
from agssd_core.training.anaus_build import build_pair
from agssd_core.views.us_batch import make_us_batch
from tests.support.us import MemoryFrames, us_config

SITE = "fan"


class Labelled(MemoryFrames):
    """Frames in memory whose labels have a source."""

    label_source = "superpixels"


class Ramp(Labelled):
    """Grey level tells the place along one axis; no view hides it."""

    def __init__(self, axis, shape=(96, 128)):
        super().__init__(3, shape=shape)
        line = np.round(np.linspace(0, 255, shape[axis])).astype(np.uint8)
        picture = np.broadcast_to(line[:, None] if axis == 0 else line, shape)
        self.images = [np.ascontiguousarray(picture)] * 3


def panels_of(frames, config, *, step=3, count=2, pair=None):
    at = StepOfRun(seed=0, site=SITE, step=step, total_steps=20, batch_size=4)
    pair = pair or build_pair(config.anaus, seed=0)
    return frame_panels(pair, frames, anaus=config.anaus, at=at, count=count)


def plain_views(**more):
    """Views without photometric changes."""
    augment = {"jitter": 0.0, "blur_p": [0, 0], "solarize_p": [0, 0]}
    return us_config(anaus={"augment": augment, **more})


def test_views_labels_and_overlap_are_those_of_the_step():
    config, frames = us_config(), Labelled()
    batch = make_us_batch(frames, config.anaus, seed=0, site=SITE, step=3, batch_size=4)
    found = panels_of(frames, config)
    assert len(found) == 2
    for panels in found:
        place = batch.frame_index.tolist().index(panels.frame_index)
        for view in range(2):
            assert np.array_equal(panels.views[view], batch.views[view, place, 0].numpy())
            assert np.array_equal(panels.view_labels[view], batch.view_labels[view, place].numpy())
        assert np.array_equal(panels.damaged, batch.damaged[place, 0].numpy())
        assert np.array_equal(panels.clean, batch.clean[place, 0].numpy())
        assert panels.overlap == pytest.approx(float(batch.overlap[place]))
        assert np.array_equal(panels.frame, frames.read_frame(panels.frame_index))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_drawn_overlap_is_the_same_place_in_the_frame_and_in_both_views(axis):
    """The ramp reads the same at the overlap's edges everywhere, flipped views included."""
    frames, flips = Ramp(axis), set()
    along = 1 - axis  # a rectangle says x first
    for step in range(6):
        for panels in panels_of(frames, plain_views(), step=step):
            start, size = panels.shared.start[along], panels.shared.size[along]
            wanted = np.array([start, start + size]) / panels.frame.shape[axis]
            flips |= set(panels.flipped)
            for view in range(2):
                box = panels.shared_in_view[view]
                edges = [box.start[along], box.start[along] + box.size[along]]
                line = panels.views[view].mean(axis=1 - axis)
                read = np.interp(np.asarray(edges) - 0.5, np.arange(len(line)), line)
                assert sorted(read) == pytest.approx(wanted, abs=0.03)
    assert flips == {True, False}


def test_frames_of_different_clips_come_first():
    frames = Labelled(4)
    infos = list(frames.infos)
    config = us_config()
    batch = make_us_batch(frames, config.anaus, seed=0, site=SITE, step=3, batch_size=4)
    order = batch.frame_index.tolist()
    same = infos[order[0]].clip
    infos[order[1]] = infos[order[1]].__class__(same, 1, "p", "GE", (72, 88))
    frames.infos = tuple(infos)
    assert [panels.frame_index for panels in panels_of(frames, config)] == [order[0], order[2]]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_features_are_those_of_the_training_pass_and_nothing_is_left_changed(norm):
    config = us_config(anaus={"backbone": {"norm": norm}})
    pair = build_pair(config.anaus, seed=0)
    pair.teacher.eval()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    frames = Labelled()
    panels = panels_of(frames, config, pair=pair)[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    assert not pair.teacher.training
    assert pair.student.training
    assert all(parameter.grad is None for parameter in pair.parameters())
    # At the start the teacher is a copy of the student.
    assert np.array_equal(panels.levels[0].student[0], panels.levels[0].teacher[0])
    assert [level.student[0].shape for level in panels.levels] == [(16, 16, 3), (8, 8, 3)]


def test_cosines_tell_a_network_that_separates_anatomies_from_one_that_does_not():
    """With a pyramid that copies the grey level, anatomies of one brightness each stand apart."""

    class Flat(Labelled):
        def __init__(self):
            super().__init__()
            levels = np.array([0, 60, 120, 190, 250], np.uint8)
            self.images = [levels[label] for label in self.maps]

    config = plain_views()
    panels = panels_of(Flat(), config)[0]
    for level in panels.levels:
        assert level.own > level.other
        for view in range(2):
            nothing = np.isnan(level.cosine[view])
            assert np.array_equal(nothing, np.isnan(level.pooled[view][..., 0]))
            assert not nothing.all()


def test_a_frame_without_anatomies_is_drawn_all_the_same():
    pictures = draw_frame_pictures(panels_of(Labelled(labels=False), us_config())[0])
    assert len(pictures) == 4
    assert "No cell belongs to an anatomy." in pictures[1].text


def test_views_that_overlap_too_little_are_said_to_be_left_out():
    anaus = {"overlap": {"min_share": 0.999, "tries": 1}}
    found = panels_of(Labelled(), us_config(anaus=anaus))
    panels = next(panels for panels in found if not panels.valid)
    words = " ".join(picture.text for picture in draw_frame_pictures(panels))
    assert "too little to be used" in words
    assert "left out of core-region prediction" in words


def test_four_pictures_of_a_frame_are_png_files_with_words_and_name_the_labels():
    pictures = draw_frame_pictures(panels_of(Labelled(), us_config())[0])
    assert [picture.name for picture in pictures] == ["pair", "anatomies", "features", "overlap"]
    for picture in pictures:
        image = Image.open(BytesIO(picture.png))
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(picture.text) > 60
        assert "nan" not in picture.text
    assert "superpixels" in pictures[0].text
    assert sources_in_words("lpsam+disk") == "LP-SAM and maps from disk"


def test_the_overlap_is_outlined_in_its_colour():
    panels = panels_of(Labelled(), us_config())[0]
    pixels = np.asarray(Image.open(BytesIO(draw_frame_pictures(panels)[0].png)).convert("RGB"))
    wanted = np.array([int(SHARED[place : place + 2], 16) for place in (1, 3, 5)])
    assert (np.abs(pixels.astype(int) - wanted).max(axis=-1) < 20).sum() > 200


def test_every_id_has_a_colour_of_its_own():
    colours = label_colours(np.arange(25, dtype=np.uint8))
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + np.eye(25)
    assert distances.min() > 0.05
