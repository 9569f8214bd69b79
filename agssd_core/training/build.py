"""From configuration to model and optimiser, and the choices that ``auto`` stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from agssd_core.config import AgssdConfig, OptimiserConfig, TrainingConfig
from agssd_core.errors import TrainingError
from agssd_core.models.student_teacher import AgssdShape, StudentTeacher, takes_weight_decay
from agssd_core.models.vit3d import VitShape
from agssd_core.views.seeds import rng_for

GLOBAL_VIEWS = 2
# Below this many views a step, batch statistics swing too much (agssd.md 9b, measured).
LEAST_VIEWS_FOR_BATCH_STATISTICS = 16
LEARNING_RATE_PER_256 = 5e-4
LEAST_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Resolved:
    """What ``auto`` became; the same at every site, because it depends on the plan alone."""

    input_norm_cls: Literal["batch", "ema", "none"]
    input_norm_patch: Literal["batch", "volume", "none"]
    target_cls: Literal["center", "sinkhorn", "none"]
    target_patch: Literal["center", "sinkhorn", "volume", "none"]


def resolve(agssd: AgssdConfig, batch_size: int) -> Resolved:
    """Settle every ``auto``, from the views per step B * V.

    From 16 views up heads are standardised with the batch's statistics and targets centred by
    their EMA. Below, the cls head uses EMA moments of teacher features, and the patch head the
    statistics and the centre of each volume's own tokens.

    Args:
        agssd: the method's settings.
        batch_size: B, volumes per step over all processes of a site.
    """
    few = batch_size * GLOBAL_VIEWS < LEAST_VIEWS_FOR_BATCH_STATISTICS
    head, target = agssd.head, agssd.target
    norm_cls = head.input_norm_cls
    norm_patch = head.input_norm_patch
    target_patch = target.patch
    return Resolved(
        input_norm_cls=("ema" if few else "batch") if norm_cls == "auto" else norm_cls,
        input_norm_patch=("volume" if few else "batch") if norm_patch == "auto" else norm_patch,
        target_cls="center" if target.cls == "auto" else target.cls,
        target_patch=("volume" if few else "center") if target_patch == "auto" else target_patch,
    )


def model_shape(agssd: AgssdConfig, training: TrainingConfig | None = None) -> AgssdShape:
    """The model's numbers; ``training`` only adds options that change no array."""
    model, head = agssd.model, agssd.head
    vit = VitShape(
        image_size=agssd.cvac.global_size,
        patch_size=model.patch_size,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        qkv_bias=model.qkv_bias,
        pos_embed=model.pos_embed,
        drop_path=model.drop_path,
        activation_checkpointing=training is not None and training.activation_checkpointing,
    )
    return AgssdShape(
        vit=vit,
        prototypes=head.prototypes,
        hidden=head.hidden,
        bottleneck=head.bottleneck,
        shared_head=head.shared,
        cvaa=agssd.cvaa.mode,
        geom_bias=agssd.cvaa.geom_bias,
        decoder=model.decoder,
        masking=model.masking,
    )


def build_model(
    agssd: AgssdConfig, *, seed: int, training: TrainingConfig | None = None
) -> StudentTeacher:
    """Draw a model's round-0 weights; the same seed gives the same bits on any machine's CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, "weights").integers(2**63 - 1)))
        return StudentTeacher(model_shape(agssd, training))


def base_learning_rate(optimiser: OptimiserConfig, *, batch_size: int, sites: int) -> float:
    """The peak learning rate: as configured, or 5e-4 * B_eff / 256 (iBOT's rule).

    B_eff counts volumes x global views over all sites of a round.
    """
    if optimiser.learning_rate is not None:
        return optimiser.learning_rate
    effective = batch_size * GLOBAL_VIEWS * sites
    return max(LEAST_LEARNING_RATE, LEARNING_RATE_PER_256 * effective / 256)


def build_optimiser(model: StudentTeacher, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over the student, in two groups: with weight decay, and without.

    The fused kernel updates each parameter on its own in a fixed order, so it is deterministic
    on the CPU as well as on CUDA. Learning rate and decay are set at every step.
    """
    named = dict(model.student.named_parameters())
    decayed = [item for name, item in named.items() if takes_weight_decay(name, item)]
    others = [item for name, item in named.items() if not takes_weight_decay(name, item)]
    groups = [{"params": decayed, "decays": True}, {"params": others, "decays": False}]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=0.0, fused=True)


def set_rates(optimiser: torch.optim.Optimizer, *, learning_rate: float, decay: float) -> None:
    """Give both groups this step's learning rate, and the first one its weight decay."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = decay if group["decays"] else 0.0


def optimiser_tensors(
    model: StudentTeacher, optimiser: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Moments and step counts by the name of their parameter; empty before the first step."""
    return {
        f"{name}/{kind}": optimiser.state[parameter][kind]
        for name, parameter in model.student.named_parameters()
        for kind in ("exp_avg", "exp_avg_sq", "step")
        if parameter in optimiser.state
    }


def load_optimiser_tensors(
    model: StudentTeacher,
    optimiser: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what ``optimiser_tensors`` named; parameters without an entry start afresh.

    Raises:
        TrainingError: an entry has the shape of another model.
    """
    for name, parameter in model.student.named_parameters():
        if f"{name}/step" not in tensors:
            optimiser.state.pop(parameter, None)
            continue
        moments = {kind: tensors[f"{name}/{kind}"] for kind in ("exp_avg", "exp_avg_sq")}
        if any(moment.shape != parameter.shape for moment in moments.values()):
            raise TrainingError(
                f"optimiser state of {name} has another shape than the model. Delete the site's "
                "training state, or use the configuration that it was saved under."
            )
        state = {kind: moment.to(parameter, copy=True) for kind, moment in moments.items()}
        # The fused kernel wants the step count beside the parameter, as one float32 number.
        state["step"] = tensors[f"{name}/step"].reshape(()).to(parameter, copy=True)
        optimiser.state[parameter] = state


def compile_blocks(model: StudentTeacher) -> None:
    """``torch.compile`` every encoder block in place; global and local crops get a graph each."""
    for network in (model.student, model.teacher):
        for block in network.encoder.blocks:
            block.compile()
