"""Options of a site's training that save memory or time, through the trainer as a site runs it."""

import math

import numpy as np
import pytest

from tests.support.training import body_volumes, small_trainer

STEPS = 2


def trained(**training):
    trainer = small_trainer(
        body_volumes(4), training={"batch_size": 4, **training}, agssd={"model": {"drop_path": 0.1}}
    )
    return trainer.train_steps(0, STEPS, 4), trainer.shared_weights()


def test_bf16_with_checkpointing_and_accumulation_stays_close_to_plain_training(tmp_path):
    """Steps and pattern of micro-batches are those of fp32; only rounding of bf16 differs."""
    plain, weights = trained(accumulate=2)
    row, rough = trained(accumulate=2, precision="bf16", activation_checkpointing=True)
    assert row.keys() == plain.keys()
    assert all(math.isfinite(value) for value in row.values())
    for name in ("loss", "loss_cls", "loss_patch", "loss_rec"):
        assert row[name] == pytest.approx(plain[name], rel=0.03), name
        assert row[name] != plain[name]
    for name, array in rough.items():
        assert array.dtype == np.float32, name
        assert np.isfinite(array).all(), name
    moved = [np.abs(rough[n] - weights[n]).max() for n in weights if n.startswith("student/")]
    assert 0 < max(moved) < 0.02


@pytest.mark.slow
# Both are torch.compile's own: an import of torch.utils.mkldnn, and a look at activations.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_train_to_the_same_weights():
    """Needs a C++ compiler and about a minute."""
    plain, weights = trained()
    row, compiled = trained(compile=True)
    assert row["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert compiled.keys() == weights.keys()
    for name, array in weights.items():
        if name.endswith(("qkv.bias", "key_value.bias")):
            continue  # gradients of rounding alone, which Adam scales up
        assert np.mean(np.abs(compiled[name] - array) > 1e-5) < 0.01, name
