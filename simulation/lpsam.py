"""Fit LP-SAM on public images, measure it, and write it as a signed file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from agssd_core.config import FramesConfig, LpsamConfig, RunConfig
from agssd_core.console import Bar
from agssd_core.data.pairs import ImageMaskPairs, LabelledFrame, read_pair
from agssd_core.errors import ClipError, ConfigError
from agssd_core.evaluation.delineation import delineate_frames
from agssd_core.evaluation.lpsam_measures import DelineationScore, score_table, score_with_controls
from agssd_core.evaluation.lpsam_pictures import draw_delineations
from agssd_core.models.lpsam import PAPER_PARAMETERS, LpSam
from agssd_core.training.devices import training_device
from agssd_core.training.lpsam_file import open_key, write_lpsam
from agssd_core.training.lpsam_fit import FitRecord, fit_lpsam
from agssd_core.training.lpsam_frames import read_fit_frames
from agssd_core.views.seeds import rng_for
from agssd_core.weights import write_text

MEASURED = 200
SHOWN = 6

Scores = dict[str, dict[str, DelineationScore]]


@dataclass(frozen=True)
class FitResult:
    """What ``fit_file`` wrote and measured; ``skipped`` is image -> reason."""

    digest: str
    record: FitRecord
    scores: Scores
    skipped: dict[str, str]
    collapsed: bool
    picture: Path


def fit_file(
    sources: Sequence[Path], out: Path, config: RunConfig, *, key: Path, bar: Bar
) -> FitResult:
    """Fit, measure on images that were kept out, sign.

    Args:
        sources: folders and CSV files of public images with masks.
        out: the ``.safetensors`` file; a picture and the signature are written beside it.
        config: its ``lpsam``, ``seed``, ``threads`` and ``data.frames`` count.
        key: the signing key, made when it is not there.
        bar: makes a progress bar by its title.

    Raises:
        ConfigError: the output's name does not end in .safetensors, or ViT-B has no weights.
        DataError: no image can be used.
        TrainingError: the loss is not finite.
    """
    lpsam, frames = config.lpsam, config.data.frames
    _require_sensible(out, lpsam)
    torch.set_num_threads(config.threads)  # threads are part of the bits
    signing = open_key(key)
    pairs = ImageMaskPairs.open(sources)
    fitted_on, kept_out = split_pairs(pairs, lpsam.hold_out, seed=config.seed)
    with bar("Reading") as advance:
        small = read_fit_frames(fitted_on, lpsam, frames, progress=advance)
    with bar("Fitting") as advance:
        device = training_device(config.training.device)
        network, record = fit_lpsam(small, lpsam, seed=config.seed, progress=advance, device=device)
    network.cpu()
    sets = {"fitted on": fitted_on, "kept out": kept_out}
    scores: Scores = {}
    for name, part in sets.items():
        labelled = _labelled(part, frames, lpsam)
        if labelled:
            scores[name] = dict(score_with_controls(network, labelled, lpsam, seed=config.seed))
    found = scores["fitted on"]["LP-SAM"]
    figures = {name: {w: asdict(s) for w, s in row.items()} for name, row in scores.items()}
    digest = write_lpsam(
        out, network, lpsam, record=record, pairs_digest=pairs.digest(), key=signing, table=figures
    )
    write_text(out.with_suffix(".curve.csv"), curve_csv(record))
    picture = out.with_suffix(".png")
    shown = _labelled(kept_out, frames, lpsam) or _labelled(fitted_on, frames, lpsam)
    _write_picture(picture, network, shown[:SHOWN], lpsam)
    skipped = {**pairs.skipped, **fitted_on.skipped, **kept_out.skipped}
    return FitResult(digest, record, scores, skipped, found.union_dice < 0.01, picture)


def split_pairs(
    pairs: ImageMaskPairs, share: float, *, seed: int
) -> tuple[ImageMaskPairs, ImageMaskPairs]:
    """Pairs to fit on, and a drawn share that is kept out."""
    count = min(round(share * len(pairs.pairs)), len(pairs.pairs) - 1)
    order = rng_for(seed, "lpsam", "hold-out").permutation(len(pairs.pairs))
    out = set(order[:count].tolist())
    parts = (
        tuple(pair for place, pair in enumerate(pairs.pairs) if (place in out) is kept)
        for kept in (False, True)
    )
    fitted, kept = (ImageMaskPairs(part) for part in parts)
    return fitted, kept


def fit_summary(result: FitResult, config: LpsamConfig) -> str:
    """Counts, curve and Dice as Markdown."""
    record = result.record
    lines = [f"{record.frames} images with {record.structures} structures."]
    for stage, curve in record.curve.items():
        paper = f", paper (ViT-B) {PAPER_PARAMETERS[stage] / 1e6:.1f} M"
        shown = " ".join(f"{loss:.3f}" for _, loss in _thinned(curve))
        lines.append(
            f"Stage {stage}: {record.parameters[stage] / 1e6:.2f} M parameters{paper}; "
            f"{record.seconds[stage]:.0f} s; loss {shown or 'not run'}"
        )
    lines += ["", score_table(result.scores)]
    if result.collapsed:
        lines += [
            "",
            "LP-SAM found next to nothing even in the images that it was fitted on. Do not "
            "deliver this file: take more steps, another learning rate, or a lower "
            f"lpsam.rules.iou (now {config.rules.iou:g}).",
        ]
    return "\n".join(lines)


def curve_csv(record: FitRecord) -> str:
    """The loss of both stages over their steps."""
    rows = [
        f"{stage},{step},{loss:.6f}"
        for stage, curve in record.curve.items()
        for step, loss in curve
    ]
    return "\n".join(["stage,step,loss", *rows]) + "\n"


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    step = max(1, len(curve) // 8)
    return [*curve[:-1:step], *curve[-1:]]


def _labelled(
    pairs: ImageMaskPairs, frames: FramesConfig, config: LpsamConfig
) -> list[LabelledFrame]:
    """Up to ``MEASURED`` images at their own size, spread over all."""
    usable = [pair for pair in pairs.pairs if pair.name not in pairs.skipped]
    chosen = usable[:: max(1, -(-len(usable) // MEASURED))]
    found = []
    for pair in chosen:
        try:
            found.append(read_pair(pair, frames, structures=config.structures))
        except ClipError as error:
            pairs.skipped[pair.name] = str(error)
    return found


def _write_picture(
    path: Path, network: LpSam, frames: Sequence[LabelledFrame], config: LpsamConfig
) -> None:
    found = delineate_frames(
        network, [item.frame for item in frames], [item.sector for item in frames], config.rules
    )
    path.write_bytes(draw_delineations(frames, found))


def _require_sensible(out: Path, config: LpsamConfig) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError("--out does not end in .safetensors. Example: lpsam-a.safetensors")
    if config.architecture == "vit-b" and not config.weights:
        raise ConfigError(
            "lpsam.architecture = vit-b from nothing would need millions of images. Name SAM's "
            "weights as lpsam.weights, or use lpsam.architecture = small."
        )
