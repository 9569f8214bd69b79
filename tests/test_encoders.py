import numpy as np
import pytest
import torch

from agssd_core.config import parse_config
from agssd_core.errors import CheckpointError, ShapeError
from agssd_core.evaluation.cells import cell_means, upsampled
from agssd_core.evaluation.controls import IntensityControl, PositionControl
from agssd_core.evaluation.encoders import VolumeEncoder, crop_starts, open_encoder
from agssd_core.evaluation.labelled import LabelledArrays
from agssd_core.models.vit3d import VisionTransformer3d, VitShape
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from tests.support.us import SMALL_US


def _ct():
    return parse_config({"preset": "tiny"}).for_cohort("ct-mr")


def _us(**backbone):
    plain = {"preset": "tiny", "cohorts": ["us"], "anaus": {"backbone": backbone}}
    return parse_config(plain).for_cohort("us")


def _scan(shape, *, blob=None, seed=0):
    image = np.random.default_rng(seed).uniform(0, 0.1, shape).astype(np.float32)
    if blob is not None:
        image[tuple(slice(c - 4, c + 4) for c in blob)] = 1.0
    return LabelledArrays(image, None, np.ones(shape, bool))


def _encoder(config, seed=0):
    us = config.federation.cohort == "us"
    model = build_pair(config.anaus, seed=seed) if us else build_model(config.agssd, seed=seed)
    return open_encoder(model.shared_weights(), config)


def _place_of_change(source, shape, blob):
    """Where maps with and without a blob differ most, in voxels."""
    change = source.maps(_scan(shape, blob=blob)) - source.maps(_scan(shape))
    size = np.linalg.norm(change, axis=0)
    cell = np.unravel_index(size.argmax(), size.shape)
    return [(c + 0.5) * side / n for c, side, n in zip(cell, shape, size.shape, strict=True)]


CASES = [
    pytest.param(_ct, (40, 50, 36), (12, 41, 28), 6, id="ct"),
    pytest.param(lambda: _us(), (150, 210), (40, 170), 8, id="us"),
]


@pytest.mark.parametrize(("config", "shape", "blob", "near"), CASES)
@pytest.mark.parametrize("kind", ["encoder", "intensity"])
def test_a_bright_blob_changes_the_map_where_it_lies(config, shape, blob, near, kind):
    source = _encoder(config()) if kind == "encoder" else IntensityControl(config())
    assert _place_of_change(source, shape, blob) == pytest.approx(blob, abs=near)


@pytest.mark.parametrize(("config", "shape", "blob", "near"), CASES)
def test_controls_have_the_grid_of_the_encoder(config, shape, blob, near):
    encoder = _encoder(config()).maps(_scan(shape))
    for control in (PositionControl(config()), IntensityControl(config())):
        assert control.maps(_scan(shape)).shape[1:] == encoder.shape[1:]


def test_position_knows_no_grey_value_and_intensity_no_place():
    config, plain, other = _ct(), _scan((24, 32, 40)), _scan((24, 32, 40), seed=1)
    position, intensity = PositionControl(config), IntensityControl(config)
    np.testing.assert_array_equal(position.maps(plain), position.maps(other))
    np.testing.assert_array_equal(position.pooled(plain), position.pooled(other))
    turned = LabelledArrays(plain.image[::-1].copy(), None, plain.inside)
    np.testing.assert_allclose(
        intensity.maps(turned), intensity.maps(plain)[:, ::-1], rtol=1e-5, atol=1e-5
    )


def test_one_crop_is_the_network_itself():
    config = _ct()
    model = build_model(config.agssd, seed=3)
    source = open_encoder(model.shared_weights(), config, network="student")
    arrays = _scan((32, 32, 32))
    model.student.eval()
    with torch.no_grad():
        cls, tokens = model.student.encoder(torch.from_numpy(arrays.image)[None, None])
    expected = tokens[0].T.reshape(48, 4, 4, 4).numpy()
    np.testing.assert_allclose(source.maps(arrays), expected, rtol=1e-5, atol=1e-5)
    pooled = torch.cat([cls[0], tokens[0].mean(0)]).numpy()
    np.testing.assert_allclose(source.pooled(arrays), pooled, rtol=1e-5, atol=1e-5)


def test_crops_cover_the_volume_and_end_at_its_border():
    starts = np.array(crop_starts((60, 20, 64), (32, 32, 32)))
    assert sorted(set(starts[:, 0])) == [0, 16, 28]
    assert set(starts[:, 1]) == {0}
    assert sorted(set(starts[:, 2])) == [0, 16, 32]


def test_crops_without_body_do_not_enter_the_pooled_features():
    shape = VitShape((16, 16, 16), 8, 12, 1, 2)
    source = VolumeEncoder(VisionTransformer3d(shape))
    image = _scan((16, 16, 48)).image
    inside = np.zeros(image.shape, bool)
    inside[..., :8] = True  # in the first crop alone
    alone = LabelledArrays(image[..., :16], None, inside[..., :16])
    whole = source.pooled(LabelledArrays(image, None, inside))
    np.testing.assert_allclose(whole, source.pooled(alone), rtol=1e-5, atol=1e-5)
    # Where no body was found, every crop counts.
    assert np.isfinite(source.pooled(LabelledArrays(image, None, inside & False))).all()


@pytest.mark.parametrize(("config", "shape", "blob", "near"), CASES)
def test_a_scan_has_the_same_bits_every_time_whatever_came_before(config, shape, blob, near):
    fresh, used = _encoder(config()), _encoder(config())
    used.maps(_scan(shape, blob=blob))
    np.testing.assert_array_equal(fresh.maps(_scan(shape)), used.maps(_scan(shape)))
    np.testing.assert_array_equal(fresh.pooled(_scan(shape)), used.pooled(_scan(shape)))


def test_bf16_is_near_to_float32():
    config, arrays = _ct(), _scan((32, 32, 40))
    weights = build_model(config.agssd, seed=0).shared_weights()
    exact = open_encoder(weights, config).maps(arrays)
    coarse = open_encoder(weights, config, precision="bf16").maps(arrays)
    assert np.abs(exact - coarse).mean() < 0.05 * np.abs(exact).mean()


def test_batchnorm_without_statistics_is_refused():
    config = parse_config(SMALL_US).for_cohort("us")
    weights = build_pair(config.anaus, seed=0).shared_weights()
    with pytest.raises(CheckpointError, match="share_statistics"):
        open_encoder(weights, config)


def test_a_scan_of_the_other_kind_is_refused():
    with pytest.raises(ShapeError, match="modalities in the task"):
        _encoder(_ct()).pooled(_scan((64, 64)))


def test_cells_hold_exact_shares_and_growing_them_keeps_their_places():
    image = np.zeros((6, 5), np.float32)
    image[:3, :2] = 1
    means = cell_means(image, (2, 2))
    np.testing.assert_allclose(means, [[0.8, 0], [0, 0]])
    ramp = np.arange(8, dtype=np.float32)[None, :, None] + np.zeros((1, 8, 2), np.float32)
    grown = upsampled(ramp, (16, 4))[0, 2:-2, 0]
    np.testing.assert_allclose(grown, (np.arange(16) + 0.5)[2:-2] / 2 - 0.5, rtol=1e-6)
