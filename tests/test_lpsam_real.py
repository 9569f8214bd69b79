"""Real breast images with masks of two kinds, and what the benchmark on them writes."""

import pytest

from agssd_core.config.frames import FramesConfig
from agssd_core.data.pairs import ImageMaskPairs, read_pair
from agssd_core.evaluation.lpsam_measures import NAMES, DelineationScore
from agssd_core.evaluation.superpixels import superpixels
from agssd_core.training.lpsam_fit import FitRecord
from benchmarks.lpsam_busi import Result, document, split_classes


@pytest.mark.realdata
def test_busi_is_read_and_cut_into_superpixels(real_data):
    pairs = ImageMaskPairs.open([real_data / "us2d" / "busi"])
    assert len(pairs.pairs) == 66
    assert not pairs.skipped
    # Benign masks are grey pictures in three channels, malignant ones have one bit a pixel.
    for pair in pairs.pairs[::11]:
        frame = read_pair(pair, FramesConfig(), structures="union")
        assert len(frame.structures) == (0 if "normal" in pair.name else 1)
        found = superpixels(frame.frame, frame.sector, regions=24)
        assert 18 <= found.max() <= 24
        assert ((found > 0) == frame.sector).all()


def test_the_benchmark_fits_on_44_and_measures_on_the_other_22():
    for seed in range(3):
        split = split_classes(dict.fromkeys(("benign", "malignant", "normal"), 22), seed=seed)
        assert sum(len(fitted) for fitted, _ in split.values()) == 44
        for fitted, tested in split.values():
            assert sorted(fitted + tested) == list(range(22))
            assert len(tested) in (7, 8)


def test_the_document_says_when_the_fit_is_no_better_than_its_controls():
    def scores(value):
        return {
            name: DelineationScore(8, 8, 0.0, value if name.startswith("LP") else 0.3, 6, 0.01)
            for name in NAMES
        }

    record = FitRecord(0, 44, 30, parameters={"adapters": 10**6, "engine": 10**5})
    for value, says in (
        (0.5, "LP-SAM is better than *untrained*"),
        (0.31, "NOT better than *random"),
    ):
        run = dict.fromkeys(("benign", "malignant", "normal"), scores(value))
        text = document([Result(run, record, 60.0)], [0])
        assert says in text
        assert f"| LP-SAM | {value:.3f} | {value:.3f} | 0.010 |" in text
        assert "| adapters | 39.65 | 13.0 |" in text
