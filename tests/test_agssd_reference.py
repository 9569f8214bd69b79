"""With CVAC, EAAM and CVAA off the step is 3D iBOT with masked reconstruction (agssd.md M9).

The reference below is written from the papers in plain loops and float64, from the arrays alone:
it shares no line with the package, not even the encoder.
"""

import math

import pytest
import torch

from tests.support.training import batch_of, body_volumes, one_step, small_config, small_learner

OFF = {
    "cvac": {"enabled": False, "n_local": 2},
    "eaam": {"enabled": False},
    "cvaa": {"mode": "off"},
}


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def encode(crop, w, *, patch, heads, hidden=None):
    """One crop (D, H, W) to its cls token and patch tokens, a token at a time."""
    side = crop.shape[0] // patch
    kernel = w["patch_embed.weight"].flatten(1)
    tokens = []
    for d in range(side):
        for h in range(side):
            for b in range(side):
                cube = crop[
                    d * patch : (d + 1) * patch,
                    h * patch : (h + 1) * patch,
                    b * patch : (b + 1) * patch,
                ]
                tokens.append(kernel @ cube.flatten() + w["patch_embed.bias"])
    if hidden is not None:
        tokens = [
            w["mask_token.weight"][0, 0] if h else t for t, h in zip(tokens, hidden, strict=True)
        ]
    place = w["pos_embed.weight"]
    native = round(place.shape[1] ** (1 / 3))
    if native != side:
        cube = place.transpose(1, 2).reshape(1, -1, native, native, native)
        cube = torch.nn.functional.interpolate(
            cube, size=(side,) * 3, mode="trilinear", align_corners=False
        )
        place = cube.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token.weight"][0], torch.stack(tokens) + place[0]])
    width = x.shape[1] // heads
    for number in range(1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks."))):
        p = {n.split(".", 2)[2]: a for n, a in w.items() if n.startswith(f"blocks.{number}.")}
        y = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        qkv = y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]
        query, key, value = qkv.chunk(3, dim=-1)
        mixed = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = query[:, own] @ key[:, own].T / math.sqrt(width)
            mixed.append(scores.softmax(-1) @ value[:, own])
        x = x + torch.cat(mixed, -1) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        y = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        y = gelu(y @ p["mlp.linear1.weight"].T + p["mlp.linear1.bias"])
        x = x + y @ p["mlp.linear2.weight"].T + p["mlp.linear2.bias"]
    x = layer_norm(x, w["norm.weight"], w["norm.bias"])
    return x[0], x[1:]


def head(rows, w):
    """Standardise over the rows, MLP, unit length, cosine with the prototypes."""
    x = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    for layer in ("mlp.0", "mlp.2"):
        x = gelu(x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    x = x @ w["mlp.4.weight"].T + w["mlp.4.bias"]
    x = x / x.norm(dim=-1, keepdim=True)
    prototypes = w["prototypes.weight"]
    return x @ (prototypes / prototypes.norm(dim=-1, keepdim=True)).T


def cross_entropy(target_logits, centre, student_logits):
    target = ((target_logits - centre) / 0.04).softmax(-1)
    return -(target * (student_logits / 0.1).log_softmax(-1)).sum()


def reference_loss(weights, batch, mask, *, patch, heads):
    """0.1 L_patch + 0.1 L_cls + L_rec of one batch, view by view and volume by volume."""
    groups = {
        f"{net}.{part}": {
            n.removeprefix(f"{net}/{part}."): torch.from_numpy(a).double()
            for n, a in weights.items()
            if n.startswith(f"{net}/{part}.")
        }
        for net in ("student", "teacher")
        for part in ("encoder", "head_cls", "head_patch", "decoder")
    }
    centre_cls = torch.from_numpy(weights["state/centre_cls"]).double()
    centre_patch = torch.from_numpy(weights["state/centre_patch"]).double()
    views, volumes = mask.shape[:2]
    where = [(v, b) for v in range(views) for b in range(volumes)]
    seen, clean = batch.globals_seen.double(), batch.globals_clean.double()
    size = {"patch": patch, "heads": heads}
    teacher = {at: encode(seen[at][0], groups["teacher.encoder"], **size) for at in where}
    student = {
        at: encode(seen[at][0], groups["student.encoder"], hidden=mask[at], **size) for at in where
    }
    local = [
        (len(student) // volumes + v, b)
        for v in range(len(batch.locals_seen))
        for b in range(volumes)
    ]
    small = {
        at: encode(
            batch.locals_seen[at[0] - views, at[1]][0].double(), groups["student.encoder"], **size
        )
        for at in local
    }

    cls_t = head(torch.stack([teacher[at][0] for at in where]), groups["teacher.head_cls"])
    every = where + local
    cls_s = head(
        torch.stack([(student | small)[at][0] for at in every]), groups["student.head_cls"]
    )
    pairs = [
        cross_entropy(cls_t[where.index((t, b))], centre_cls, cls_s[every.index((s, b))])
        for t in range(views)
        for s in range(views + len(batch.locals_seen))
        for b in range(volumes)
        if s != t
    ]

    hidden = [(at, i) for at in where for i in range(mask.shape[2]) if mask[at][i]]
    patch_t = head(
        torch.stack([teacher[at][1][i] for at, i in hidden]), groups["teacher.head_patch"]
    )
    patch_s = head(
        torch.stack([student[at][1][i] for at, i in hidden]), groups["student.head_patch"]
    )
    decoder, side = groups["student.decoder"], round(mask.shape[2] ** (1 / 3))
    patch_terms, rec_terms = [], []
    for at in where:
        mine = [row for row, (crop, _) in enumerate(hidden) if crop == at]
        patch_terms.append(
            sum(cross_entropy(patch_t[r], centre_patch, patch_s[r]) for r in mine) / len(mine)
        )
        errors = []
        for row in mine:
            token = hidden[row][1]
            d, h, b = token // side**2, token // side % side, token % side
            cube = clean[at][0][
                d * patch : (d + 1) * patch,
                h * patch : (h + 1) * patch,
                b * patch : (b + 1) * patch,
            ]
            guess = layer_norm(student[at][1][token], decoder["norm.weight"], decoder["norm.bias"])
            guess = guess @ decoder["out.weight"].T + decoder["out.bias"]
            errors.append((guess - cube.flatten()).abs().mean())
        rec_terms.append(sum(errors) / len(errors))
    l_cls, l_patch = sum(pairs) / len(pairs), sum(patch_terms) / len(patch_terms)
    l_rec = sum(rec_terms) / len(rec_terms)
    return {
        "loss_cls": float(l_cls),
        "loss_patch": float(l_patch),
        "loss_rec": float(l_rec),
        "loss": float(0.1 * l_patch + 0.1 * l_cls + l_rec),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_ablations_off_equal_plain_ibot_with_reconstruction(seed):
    config = small_config(
        agssd=OFF
        | {
            "head": {"input_norm_cls": "batch", "input_norm_patch": "batch"},
            "target": {"patch": "center"},
        },
        training={"batch_size": 3},
        seed=seed,
    )
    learner, batch = small_learner(config), batch_of(config, body_volumes())
    generator = torch.Generator().manual_seed(seed)
    for centre in (learner.model.state.centre_cls, learner.model.state.centre_patch):
        centre.copy_(0.05 * torch.randn(len(centre), generator=generator))
    for parameter in learner.model.teacher.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    weights = learner.model.shared_weights()

    result = one_step(learner, config, batch)

    mask = result.hiding.hidden.mask
    assert mask.sum(-1).unique().tolist() == [round(0.6 * mask.shape[-1])]
    expected = reference_loss(
        weights, batch, mask, patch=config.agssd.model.patch_size, heads=config.agssd.model.heads
    )
    for name, value in expected.items():
        assert float(result.terms[name]) == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("part", sorted(OFF))
def test_each_module_departs_from_the_plain_objective(part):
    plain = small_config(agssd=OFF)
    config = small_config(agssd={name: node for name, node in OFF.items() if name != part})
    off, on = (one_step(small_learner(c), c, batch_of(c), step=8) for c in (plain, config))
    assert float(off.terms["loss"]) != float(on.terms["loss"])
    assert ("loss_patch_fused" in on.terms) == (part == "cvaa")
    assert "loss_patch_fused" not in off.terms
