from dataclasses import replace

import numpy as np
import pytest
import torch

from agssd_core.config import parse_config
from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import ConfigError, DataError, WeightsError
from agssd_core.evaluation.finetune import finetune, judge
from agssd_core.evaluation.finetune_batches import Batches
from agssd_core.evaluation.finetune_build import build_network, load_encoder
from agssd_core.evaluation.finetune_predict import Predictor
from agssd_core.evaluation.labelled import LabelledSet, store_scan
from simulation.phantom_anatomy import LABEL_NAMES
from tests.support.labelled import checkpoint, frames, volumes

BONE = LABEL_NAMES.index("bone")
TISSUES = (LABEL_NAMES.index("muscle"), LABEL_NAMES.index("fat"))
ORGANS = TaskConfig(name="tissues", kind="segmentation", structures=TISSUES)
CHAMBER = TaskConfig(name="lv", kind="segmentation", structures=(1,))
PARITY = TaskConfig(name="parity", kind="classification", label="parity")
FAST = FinetuneConfig(steps=40, batch=1, crops=2, learning_rate=3e-3, feature_size=8)


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    config = parse_config({"preset": "tiny", "data": {"spacing_mm": [6.0] * 3}}).for_cohort("ct-mr")
    return config, volumes(tmp_path_factory.mktemp("ct"), config.data), checkpoint(config)


@pytest.fixture(scope="module")
def us(tmp_path_factory):
    config = parse_config({"preset": "tiny", "cohorts": ["us"]}).for_cohort("us")
    return config, frames(tmp_path_factory.mktemp("us"), bright_class=True), checkpoint(config)


def _untrained_dice(scans, task, config, weights, done):
    network = build_network(done.build, seed=0)
    load_encoder(network, weights, config)
    predictor = Predictor(network, size=done.build["size"], overlap=0.5)
    return judge(predictor, scans.of(task).test, task, ()).metrics["dice"]


def test_volumes_are_segmented_better_than_before_and_the_loss_falls(ct):
    config, scans, weights = ct
    done = finetune(scans, ORGANS, weights, config, FAST)
    assert np.mean(done.losses[-5:]) < 0.7 * np.mean(done.losses[:5])
    before = _untrained_dice(scans, ORGANS, config, weights, done)
    assert done.outcome.metrics["dice"] > max(0.6, before + 0.2)
    assert done.outcome.scans == {"a": 1, "b": 1}
    assert not set(done.trained_on) & {scan.scan for scan in scans.test.scans}


def test_frames_are_segmented_better_than_before_and_the_loss_falls(us):
    config, scans, weights = us
    settings = FAST.model_copy(
        update={"batch": 4, "steps": 60, "learning_rate": 1e-2, "layer_decay": 1.0}
    )
    done = finetune(scans, CHAMBER, weights, config, settings)
    assert np.mean(done.losses[-5:]) < 0.7 * np.mean(done.losses[:5])
    before = _untrained_dice(scans, CHAMBER, config, weights, done)
    assert done.outcome.metrics["dice"] > max(0.6, before + 0.2)


def test_frames_are_classified(us):
    config, scans, weights = us
    settings = FAST.model_copy(update={"batch": 4, "steps": 60})
    done = finetune(scans, PARITY, weights, config, settings)
    assert done.classes == ("even", "odd")
    assert done.outcome.metrics["balanced_accuracy"] == 1
    assert done.losses[-1] < 0.5 * done.losses[0]


def test_volumes_are_classified(ct, tmp_path):
    """Of two classes of volumes one is half as bright."""
    config, scans, weights = ct
    shaded = []
    for number, scan in enumerate(scans.scans):
        arrays = scan.load()
        image = (arrays.image * 65535 * (0.3 if number % 2 else 1)).astype(np.uint16)
        moved = replace(scan, file=tmp_path / scan.file.name)
        shaded.append(store_scan(moved, image, inside=arrays.inside, mask=arrays.mask))
    settings = FAST.model_copy(update={"batch": 2})
    done = finetune(LabelledSet(tuple(shaded)), PARITY, weights, config, settings)
    assert done.outcome.metrics["accuracy"] == 1


@pytest.mark.parametrize("cohort", ["ct", "us"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(cohort, request):
    config, scans, weights = request.getfixturevalue(cohort)
    task = ORGANS if cohort == "ct" else CHAMBER
    short = FAST.model_copy(update={"steps": 3})

    def trained(seed):
        done = finetune(scans, task, weights, config, short, seed=seed)
        return done.losses, done.network.state_dict()

    (losses, arrays), (again, same), (other, _) = trained(0), trained(0), trained(1)
    assert losses == again != other
    assert all(torch.equal(arrays[name], same[name]) for name in arrays)


def test_a_frozen_encoder_stays_as_it_is(us):
    config, scans, weights = us
    short = FAST.model_copy(update={"steps": 3, "frozen": True})
    done = finetune(scans, CHAMBER, weights, config, short)
    before = build_network(done.build, seed=0)
    load_encoder(before, weights, config)
    after = done.network.state_dict()
    for name, array in before.state_dict().items():
        same = torch.equal(array, after[name])
        assert same == name.startswith(("encoder.", "pyramid.")), name


def test_batchnorm_statistics_that_stayed_at_the_sites_are_measured(us):
    _, scans, _ = us
    given = {"preset": "tiny", "cohorts": ["us"], "anaus": {"backbone": {"norm": "batch"}}}
    config = parse_config(given).for_cohort("us")
    settings = FAST.model_copy(update={"steps": 1, "frozen": True, "batch": 4})
    done = finetune(scans, CHAMBER, checkpoint(config), config, settings)
    norm = done.network.encoder.backbone.bn1
    assert norm.running_mean.abs().max() > 0.01
    assert int(norm.num_batches_tracked) > 1
    assert norm.momentum == 0.1


def test_a_fraction_learns_from_fewer_patients_and_is_judged_on_the_same(ct):
    config, scans, weights = ct
    short = FAST.model_copy(update={"steps": 1})
    whole = finetune(scans, ORGANS, weights, config, short)
    third = finetune(scans, ORGANS, weights, config, short, fraction=0.34)
    assert (len(whole.trained_on), len(third.trained_on)) == (3, 1)
    assert set(third.trained_on) < set(whole.trained_on)
    assert third.outcome.scans == whole.outcome.scans


def test_without_weights_the_same_network_starts_at_random(ct):
    config, scans, weights = ct
    short = FAST.model_copy(update={"steps": 1})
    started, random = (finetune(scans, ORGANS, w, config, short) for w in (weights, None))
    assert started.build == random.build
    assert started.losses != random.losses


@pytest.mark.parametrize("shape", [(40, 36, 33), (20, 40, 32), (50, 70)], ids=str)
def test_images_and_their_truth_are_cut_alike(ct, tmp_path, shape):
    """Of a scan that is bright exactly where it is outlined, every cut is so too."""
    _, scans, _ = ct
    drawn = np.random.default_rng(0).random([side // 5 + 1 for side in shape]) > 0.6
    mask = np.kron(drawn, np.ones([5] * len(shape)))[tuple(map(slice, shape))].astype(np.uint8)
    size = (32, 32, 32) if len(shape) == 3 else (100, 140)
    scan = replace(scans.scans[0], file=tmp_path / "blocks.npz")
    inside = np.ones(shape, bool)
    stored = store_scan(scan, mask * np.uint8(200), inside=inside, mask=mask)
    task = TaskConfig(name="blocks", kind="segmentation")
    batches = Batches([stored], None, task, size=size, settings=FAST, seed=0)
    for step in range(4):
        images, truth = batches.draw(step)
        assert images.shape == truth.shape
        assert images.shape[2:] == size
        wrong = (images > 0.4).float() != truth
        # Where frames are resized, the two may round an edge differently.
        assert wrong.float().mean() <= (0 if len(shape) == 3 else 0.02)


@pytest.mark.parametrize("positive", [0.0, 1.0])
def test_cubes_are_centred_in_structures_as_often_as_asked(ct, positive):
    _, scans, _ = ct
    bones = TaskConfig(name="bones", kind="segmentation", structures=(BONE,))
    settings = FAST.model_copy(update={"positive": positive})
    batches = Batches(scans.scans, None, bones, size=(8, 8, 8), settings=settings, seed=0)
    drawn = [batches.draw(step)[1] for step in range(20)]
    # Cubes of 8 voxels in volumes of 32 at least: few are moved away from the border.
    hits = torch.cat(drawn)[:, 0, 4, 4, 4].mean()
    assert hits > 0.8 if positive else hits < 0.2


def test_tasks_without_scans_are_refused_with_the_way_out(ct):
    config, scans, weights = ct
    with pytest.raises(DataError, match="--folds"):
        finetune(scans.train, ORGANS, weights, config, FAST)
    with pytest.raises(DataError, match="Check its label"):
        finetune(scans.test, ORGANS, weights, config, FAST)
    one = TaskConfig(name="x", kind="classification", label="none")
    with pytest.raises(DataError, match="no held-out scan"):
        finetune(scans, one, weights, config, FAST)


def test_weights_of_another_run_are_refused(ct, us):
    config, scans, _ = ct
    with pytest.raises(WeightsError):
        finetune(scans, ORGANS, us[2], config, FAST)


def test_settings_out_of_range_are_refused():
    with pytest.raises((ConfigError, ValueError), match=r"finetune\.steps"):
        FinetuneConfig(steps=0)
