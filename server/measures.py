"""The metrics that the page shows, under the headings that it gives them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A metric as the page shows it: its heading and what it says, in a sentence."""

    metric: str
    title: str
    note: str
    gated: bool = False


MONITOR = (
    Measure(
        "information_cls",
        "Information, cls head (nat)",
        "How much a cls target tells about its volume. Near 0 is collapse.",
        gated=True,
    ),
    Measure(
        "information_patch",
        "Information, patch head (nat)",
        "How much a patch target tells about its token. Near 0 is collapse.",
        gated=True,
    ),
    Measure(
        "effective_rank",
        "Effective rank of teacher tokens",
        "How many dimensions the features use.",
    ),
    Measure(
        "cls_std",
        "Spread of the cls token",
        "Standard deviation over volumes; 0 means that all look the same.",
    ),
    Measure(
        "drift",
        "Drift between views",
        "1 - cosine of teacher tokens of the same place in two views.",
    ),
    Measure(
        "drift_fused", "Drift between views, fused tokens", "The same after cross-view attention."
    ),
)
LOSSES = (
    Measure("loss", "Total loss", "Weighted sum. A falling total alone proves nothing."),
    Measure("loss_rec", "Reconstruction, masked L1", "Should fall."),
    Measure(
        "rec_ratio",
        "Reconstruction error ratio",
        "Masked L1 over that of the best single grey value of each volume; 1 is no better.",
    ),
    Measure("loss_patch", "Patch distillation (nat)", "May rise or fall in a healthy run."),
    Measure("loss_cls", "Cls distillation (nat)", "Starts near ln K; may stay there for long."),
    Measure(
        "loss_patch_fused",
        "Patch distillation, fused (nat)",
        "The cross-view part of the patch term.",
    ),
)
WORKINGS = (
    Measure("overlap", "Overlap of crop pairs", "Share of the smaller global crop."),
    Measure("inner_mean", "Tokens with a counterpart", "Share inside the other view's grid."),
    Measure("mask_ratio", "Mask ratio", "Share of tokens hidden."),
    Measure("edge_share", "Edge tokens hidden", "Share of the hidden tokens that are edges."),
    Measure("grad_norm", "Gradient norm", "Before clipping."),
    Measure("learning_rate", "Learning rate", "By the global step."),
    Measure("ema_momentum", "Teacher's EMA momentum", "By the global step."),
    Measure("teacher_temperature", "Teacher temperature", "By the global step."),
    Measure("beta", "Weight of fused targets", "By the global step."),
    Measure("volumes_per_s", "Volumes per second", "Training speed."),
)
IN_TABLE = (
    "loss_rec",
    "rec_ratio",
    "information_cls",
    "information_patch",
    "effective_rank",
    "drift",
    "drift_fused",
)
BY_NAME = {measure.metric: measure for measure in (*MONITOR, *LOSSES, *WORKINGS)}
DRIFTS = ("drift", "drift_fused")
