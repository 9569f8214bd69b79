import json
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import ConfigError, WeightsError
from agssd_core.training.lpsam_file import (
    open_key,
    read_lpsam,
    signature_path,
    verify_lpsam,
    write_lpsam,
)
from agssd_core.training.lpsam_fit import FitRecord, build_lpsam
from agssd_core.weights import load_weights, save_weights
from simulation.cli import app
from simulation.lpsam import split_pairs
from tests.support.lpsam import SHORT, ellipse_frame


@pytest.fixture
def signed(tmp_path):
    network, _ = build_lpsam(SHORT, seed=0)
    key = open_key(tmp_path / "keys" / "key.pem")
    path = tmp_path / "lpsam-a.safetensors"
    record = FitRecord(0, 4, 8, curve={"engine": [(1, 0.5)]})
    config = SHORT.model_copy(update={"weights": "", "structures": "union"})
    digest = write_lpsam(path, network, config, record=record, pairs_digest="p" * 64, key=key)
    return path, digest, network


def test_a_file_gives_back_network_configuration_and_record(signed):
    path, digest, network = signed
    read = read_lpsam(path, trusted=frozenset({digest}))
    images = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(network(images), read.network(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    state = read.network.state_dict()
    assert all(torch.equal(item, state[name]) for name, item in network.state_dict().items())
    assert read.config.structures == "union"
    assert read.about["record"]["curve"] == {"engine": [[1, 0.5]]}
    assert read.about["pairs"] == "p" * 64
    assert {"agssd-federation", "torch", "transformers"} <= set(read.about["versions"])
    assert not any(item.requires_grad for item in read.network.parameters())


def test_only_a_digest_that_the_site_trusts_is_taken(signed):
    path, digest, _ = signed
    with pytest.raises(WeightsError, match="pass it as --digest, or list it in policy"):
        read_lpsam(path, trusted=frozenset({"0" * 64}))
    with pytest.raises(WeightsError, match=digest):
        read_lpsam(path, trusted=frozenset())


def test_a_changed_bit_or_signature_refuses_the_file(signed):
    path, digest, _ = signed
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="Have both delivered again"):
        read_lpsam(path, trusted=frozenset({digest}))
    data[-1] ^= 1
    path.write_bytes(data)
    text = signature_path(path).read_text()
    plain = json.loads(text)
    broken = [
        "",
        "[]",
        "{}",
        json.dumps({**plain, "signature": "00" * 64}),
        json.dumps({**plain, "public_key": "11" * 32}),
        json.dumps({**plain, "public_key": 5}),
    ]
    for other in broken:
        signature_path(path).write_text(other)
        with pytest.raises(WeightsError, match="Have both delivered again"):
            verify_lpsam(path, trusted=frozenset({digest}))
    signature_path(path).unlink()
    with pytest.raises(WeightsError, match="no signature"):
        verify_lpsam(path, trusted=frozenset({digest}))
    signature_path(path).write_text(text)
    assert verify_lpsam(path, trusted=frozenset({digest}))[0] == digest
    with pytest.raises(WeightsError, match="missing"):
        verify_lpsam(path.with_name("other"), trusted=frozenset({digest}))


def _sign_again(path, tmp_path, **changes):
    """What a signer could do by mistake: a valid signature over a file that is not right."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as stream:
        about = dict(stream.metadata())
    arrays = load_weights(path)
    if "arrays" in changes:
        arrays = changes.pop("arrays")(arrays)
    save_weights(path, arrays, metadata={**about, **changes})
    from agssd_core.training import lpsam_file
    from agssd_core.weights import file_digest

    key = open_key(tmp_path / "keys" / "key.pem")
    digest = file_digest(path)
    signature_path(path).write_text(
        json.dumps(
            {
                "public_key": key.public_key().public_bytes_raw().hex(),
                "signature": key.sign(lpsam_file._message(digest)).hex(),
            }
        )
    )
    return frozenset({digest})


def test_a_signed_file_of_something_else_is_refused(signed, tmp_path):
    path, _, _ = signed
    trusted = _sign_again(path, tmp_path, arrays=lambda a: dict(list(a.items())[:-1]))
    with pytest.raises(WeightsError, match="arrays do not fit"):
        read_lpsam(path, trusted=trusted)
    trusted = _sign_again(path, tmp_path, config='{"unknown": 1}')
    with pytest.raises(WeightsError, match="configuration does not fit"):
        read_lpsam(path, trusted=trusted)
    trusted = _sign_again(path, tmp_path, format="other")
    with pytest.raises(WeightsError, match="no LP-SAM of format"):
        read_lpsam(path, trusted=trusted)


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "deep" / "key.pem"
    first = open_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert open_key(path).private_bytes_raw() == first.private_bytes_raw()
    path.chmod(0o640)
    with pytest.raises(WeightsError, match="Give it mode 0600"):
        open_key(path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(WeightsError, match="no Ed25519 key"):
        open_key(path)


def test_an_interrupted_rewrite_leaves_no_signed_mixture(signed, monkeypatch):
    path, digest, network = signed

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("agssd_core.training.lpsam_file.save_weights", stop)
    key = open_key(path.parent / "keys" / "key.pem")
    with pytest.raises(KeyboardInterrupt):
        write_lpsam(path, network, SHORT, record=FitRecord(0, 1, 1), pairs_digest="", key=key)
    with pytest.raises(WeightsError, match="no signature"):
        read_lpsam(path, trusted=frozenset({digest}))


def test_an_order_to_sites_does_not_hold_lpsam():
    config = parse_config({"cohorts": ["us"], "lpsam": {"weights": "", "regions": 3}})
    assert '"regions":3' in dump_config(config)
    assert config.for_cohort("us").lpsam == parse_config({}).lpsam


def _public_images(folder, count=6):
    folder.mkdir()
    for number in range(count):
        item = ellipse_frame(number, (96, 128))
        Image.fromarray(item.frame).save(folder / f"x{number}.png")
        for place, structure in enumerate(item.structures):
            Image.fromarray(structure).save(folder / f"x{number}_mask_{place}.png")
    Image.fromarray(item.frame).save(folder / "alone.png")


def test_the_command_fits_signs_and_says_what_it_did(tmp_path):
    _public_images(tmp_path / "public")
    out, key = tmp_path / "lpsam-a.safetensors", tmp_path / "key.pem"
    words = ["lpsam-fit", str(tmp_path / "public"), "--out", str(out), "--key", str(key)]
    words += ["--set", "preset=tiny", "--set", "lpsam.adapters.steps=2", "--set", "lpsam.regions=2"]
    words += ["--set", "lpsam.engine.steps=2", "--set", "lpsam.hold_out=0.34"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    digest = result.output.split()[-1]
    assert len(digest) == 64
    assert "| kept out | random prompts | 4 |" in result.output
    assert "paper (ViT-B) 11.1 M" in result.output
    assert "skipped alone.png: has no mask" in result.output
    assert key.read_text() not in result.output
    assert read_lpsam(out, trusted=frozenset({digest})).config.regions == 2
    assert out.with_suffix(".curve.csv").read_text().startswith("stage,step,loss\nadapters,1,")
    with Image.open(out.with_suffix(".png")) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    first = out.read_bytes()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert load_weights(out).keys()
    assert out.read_bytes()[-1000:] == first[-1000:]  # the same seed, the same weights


def test_vit_b_from_nothing_is_refused(tmp_path):
    from agssd_core.console import progress_bar
    from simulation.lpsam import fit_file

    config = parse_config({"lpsam": {"architecture": "vit-b"}})
    with pytest.raises(ConfigError, match="would need millions of images"):
        fit_file(
            [tmp_path], tmp_path / "a.safetensors", config, key=tmp_path / "k", bar=progress_bar
        )
    assert not (tmp_path / "k").exists()


def test_held_out_images_are_drawn_by_the_seed_and_never_fitted_on(tmp_path):
    from agssd_core.data.pairs import ImageMaskPairs

    _public_images(tmp_path / "public", count=10)
    pairs = ImageMaskPairs.open([tmp_path / "public"])
    fitted, kept = split_pairs(pairs, 0.3, seed=0)
    assert (len(fitted.pairs), len(kept.pairs)) == (7, 3)
    assert {p.name for p in fitted.pairs}.isdisjoint({p.name for p in kept.pairs})
    assert split_pairs(pairs, 0.3, seed=0)[1].pairs == kept.pairs
    assert any(split_pairs(pairs, 0.3, seed=s)[1].pairs != kept.pairs for s in range(1, 4))
