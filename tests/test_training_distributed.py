"""Two processes with half the batch each are one process with all of it."""

import json
import socket
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from agssd_core.config import dump_config
from agssd_core.errors import TrainingError
from agssd_core.training.checkpoint import StateStamp
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.site_round import SiteTrainer
from agssd_core.training.worker import RoundJob, train_on_processes, visible_processes
from agssd_core.weights import load_weights, save_weights
from tests.support.training import body_volumes, small_config

EVERYTHING = {
    "training": {"batch_size": 4},
    "agssd": {"head": {"input_norm_cls": "batch", "input_norm_patch": "batch"},
              "target": {"patch": "center"}},
}  # fmt: skip
KINDS = {
    "batch statistics, centres": EVERYTHING,
    "sinkhorn, ema statistics": {
        "training": {"batch_size": 4},
        "agssd": {
            "head": {"input_norm_cls": "ema"},
            "target": {"cls": "sinkhorn", "patch": "sinkhorn"},
        },
    },
}
COMPARED = (
    "loss", "loss_cls", "loss_patch", "loss_rec", "information_cls", "information_patch",
    "cls_std", "effective_rank",
)  # fmt: skip
STEPS = 2


def train(changes, folder, name):
    trainer = SiteTrainer(small_config(**changes), body_volumes(5), site="a")
    metrics = trainer.train_steps(0, STEPS, 4)
    save_weights(folder / f"{name}.safetensors", trainer.shared_weights())
    (folder / f"{name}.json").write_text(json.dumps(metrics))


def rank_main(rank, port, changes, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for number, kind in enumerate(changes):
        train(kind, folder, f"{number}-rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every kind trained by one process and by two that talk over loopback."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kinds = list(KINDS.values())
    mp.spawn(rank_main, args=(port, kinds, folder), nprocs=2)
    for number, kind in enumerate(kinds):
        train(kind, folder, f"{number}-whole")
    return folder


def assert_close(name, found, expected):
    apart = np.abs(found - expected)
    if name.startswith("state/"):
        assert apart.max() <= 1e-6, name
    # Where a gradient is rounding alone (a key's bias has no influence) Adam scales it up.
    elif not name.endswith(("qkv.bias", "key_value.bias")):
        assert np.mean(apart > 5e-6) < 0.002, name
    assert apart.max() < 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_two_gloo_processes_equal_one(trained, kind):
    number = list(KINDS).index(kind)
    whole = load_weights(trained / f"{number}-whole.safetensors")
    ranks = [load_weights(trained / f"{number}-rank{rank}.safetensors") for rank in (0, 1)]
    for name, array in whole.items():
        # The ranks agree bit for bit; with one process only rounding differs.
        assert np.array_equal(ranks[0][name], ranks[1][name]), name
        assert_close(name, ranks[0][name], array)
    metrics = json.loads((trained / f"{number}-whole.json").read_text())
    shares = [json.loads((trained / f"{number}-rank{rank}.json").read_text()) for rank in (0, 1)]
    for name in COMPARED:
        assert shares[0][name] == shares[1][name]
        assert shares[0][name] == pytest.approx(metrics[name], abs=1e-6, rel=1e-6), name
    moved = [np.abs(whole[f"state/centre_{head}"]).max() for head in ("cls", "patch")]
    assert (min(moved) > 0) == (number == 0)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(TrainingError, match="Use a multiple of 3"):
        ProcessGroup(rank=0, size=3).share_of_batch(8)
    assert ProcessGroup(rank=1, size=2).share_of_batch(8) == slice(4, 8)


def test_one_process_without_gpus():
    assert visible_processes(small_config()) == 1


@pytest.mark.federation
def test_a_round_of_two_processes_at_a_prepared_site(tmp_path):
    """The entry that a site with several GPUs uses, here with two CPU processes."""
    from agssd_core.data.cache import SiteVolumes
    from tests.support.sites import FAST, make_site

    site = make_site(tmp_path / "site")
    config = small_config(data=FAST.model_dump(), **EVERYTHING)
    alone = SiteTrainer(config, SiteVolumes.open(site, config.data), site="a")
    base = alone.shared_weights()
    expected = alone.train_steps(0, 2, 4)
    job = RoundJob(
        config=dump_config(config), site="a", sites=1, site_dir=str(site), first_step=0,
        steps=2, total_steps=4, state_dir=str(tmp_path / "state"),
        after=StateStamp("run", 0, "plan"),
    )  # fmt: skip
    assert json.loads(json.dumps(asdict(job)))["after"]["run"] == "run"
    weights, metrics = train_on_processes(job, base, tmp_path / "job", processes=2, timeout_s=300)
    assert metrics["information_cls"] == pytest.approx(expected["information_cls"], abs=1e-4)
    for name, array in alone.shared_weights().items():
        assert_close(name, weights[name], array)
    assert alone.load_state(tmp_path / "state", StateStamp("run", 0, "plan"))

    broken = RoundJob(**(asdict(job) | {"site_dir": str(tmp_path / "nowhere"), "after": None}))
    with pytest.raises(TrainingError, match=r"(?i)index"):
        train_on_processes(broken, base, tmp_path / "broken", processes=2, timeout_s=300)
