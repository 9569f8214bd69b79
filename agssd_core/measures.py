"""The metrics that the page shows of each cohort, under the headings that it gives them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A metric as the page shows it: its heading and what it says, in a sentence.

    ``gate`` names the least healthy value: where the configuration says it, and what it is else.
    """

    metric: str
    title: str
    note: str
    gate: tuple[str, float] | None = None


@dataclass(frozen=True)
class CohortMeasures:
    """What the page shows of one cohort.

    Attributes:
        title: of the cohort. method: what trains it, in words.
        scans: what a site has: volumes or clips.
        in_table: metrics of the table of newest values.
        together: metrics whose charts share their axis, being there to be compared.
        settings: dotted names of the settings that are listed, with their labels.
    """

    title: str
    method: str
    scans: str
    monitor: tuple[Measure, ...]
    losses: tuple[Measure, ...]
    workings: tuple[Measure, ...]
    in_table: tuple[str, ...]
    together: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    @property
    def titles(self) -> Mapping[str, str]:
        """Metric -> heading."""
        found = (*self.monitor, *self.losses, *self.workings)
        return {measure.metric: measure.title for measure in found}


_GATE_NAT = ("monitor.gate_nat", 0.1)
_GATE_GAP = ("monitor.gate_gap", 0.02)
# What ANAUS's monitor lets pass without a setting of its own.
_GATE_SPREAD, _GATE_RANK = ("", 0.05), ("", 0.25)

_COMMON_SETTINGS = (
    ("preset", "Preset"),
    ("seed", "Seed"),
    ("threads", "Threads"),
    ("federation.rounds", "Rounds planned"),
    ("federation.steps_per_round", "Steps per round and site"),
    ("federation.min_sites", "Sites needed"),
    ("federation.merge.student", "Student rule"),
    ("federation.merge.teacher", "Teacher rule"),
    ("federation.merge.weighting", "Weighting"),
    ("federation.merge.max_weight", "Greatest share of one site"),
)

_MONITOR = (
    Measure(
        "information_cls",
        "Information, cls head (nat)",
        "How much a cls target tells about its volume. Near 0 is collapse.",
        gate=_GATE_NAT,
    ),
    Measure(
        "information_patch",
        "Information, patch head (nat)",
        "How much a patch target tells about its token. Near 0 is collapse.",
        gate=_GATE_NAT,
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
_LOSSES = (
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
_WORKINGS = (
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

_US_MONITOR = (
    Measure(
        "anatomy_gap",
        "Lead of the same anatomy (cosine)",
        "Cosine between two views of one anatomy, less that between different anatomies of a "
        "frame. Near 0, anatomies are not told apart.",
        gate=_GATE_GAP,
    ),
    Measure(
        "projection_std",
        "Spread of projections",
        "Standard deviation on the unit sphere, at the scale where it is least; 0 is collapse.",
        gate=_GATE_SPREAD,
    ),
    Measure(
        "effective_rank",
        "Effective rank of teacher projections",
        "How many dimensions the anatomies use.",
    ),
    Measure(
        "effective_rank_share",
        "Effective rank, share of its start",
        "Some is given up in healthy training; under the gate it is collapse.",
        gate=_GATE_RANK,
    ),
    Measure(
        "same_anatomy_cosine",
        "Cosine, same anatomy",
        "Teacher projections of one anatomy in the two views of a frame.",
    ),
    Measure(
        "other_anatomy_cosine",
        "Cosine, different anatomies",
        "Teacher projections of different anatomies in the two views of a frame.",
    ),
)
_US_LOSSES = (
    Measure("loss", "Total loss", "Weighted sum. A falling total alone proves nothing."),
    Measure(
        "loss_align",
        "Inter-view alignment (nat)",
        "Contrast of anatomies, summed over the scales. Should fall.",
    ),
    Measure(
        "loss_context",
        "Core-region prediction",
        "Error of the anatomies of a damaged overlap, summed over the scales. May rise while "
        "projections spread.",
    ),
)
_US_WORKINGS = (
    Measure("overlap", "Overlap of view pairs", "Share of the smaller view."),
    Measure("valid_share", "Usable overlaps", "Share of frames whose two views overlap enough."),
    Measure("anatomies_per_view", "Anatomies in a view", "At the finest scale, without id 0."),
    Measure("grad_norm", "Gradient norm", "Of the student, over all its weights."),
    Measure("learning_rate", "Learning rate", "By the global step."),
    Measure("ema_momentum", "Teacher's EMA momentum", "By the global step."),
    Measure("frames_per_s", "Frames per second", "Training speed."),
)
_MEASURES = {
    "ct-mr": CohortMeasures(
        title="CT and MR",
        method="AG-SSD",
        scans="Volumes",
        monitor=_MONITOR,
        losses=_LOSSES,
        workings=_WORKINGS,
        in_table=(
            "loss_rec",
            "rec_ratio",
            "information_cls",
            "information_patch",
            "effective_rank",
            "drift",
            "drift_fused",
        ),
        together=("drift", "drift_fused"),
        settings=(
            *_COMMON_SETTINGS,
            ("training.batch_size", "Batch size, volumes"),
            ("training.precision", "Precision"),
            ("agssd.model.width", "Model width"),
            ("agssd.model.depth", "Model depth"),
            ("agssd.model.patch_size", "Patch size, voxels"),
            ("agssd.cvac.global_size", "Global crop, voxels"),
            ("data.spacing_mm", "Spacing, mm"),
        ),
    ),
    "us": CohortMeasures(
        title="Ultrasound",
        method="ANAUS",
        scans="Clips",
        monitor=_US_MONITOR,
        losses=_US_LOSSES,
        workings=_US_WORKINGS,
        in_table=(
            "loss_align",
            "loss_context",
            "same_anatomy_cosine",
            "other_anatomy_cosine",
            "anatomy_gap",
            "effective_rank_share",
            "projection_std",
        ),
        together=("same_anatomy_cosine", "other_anatomy_cosine"),
        settings=(
            *_COMMON_SETTINGS,
            ("anaus.batch_size", "Batch size, frames"),
            ("training.precision", "Precision"),
            ("anaus.backbone.depth", "Depth of the ResNet"),
            ("anaus.backbone.width", "Width of its stem"),
            ("anaus.backbone.norm", "Norm"),
            ("anaus.augment.size", "Size of a view, pixels"),
            ("anaus.regions.scales", "Scales, cells a side"),
            ("anaus.regions.per_view", "Anatomies drawn of a view"),
            ("anaus.labels", "Anatomy labels"),
        ),
    ),
}


def measures_of(cohort: str) -> CohortMeasures:
    """What the page shows of a cohort; of one that is not known, what it shows of CT and MR."""
    return _MEASURES.get(cohort, _MEASURES["ct-mr"])
