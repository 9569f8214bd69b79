"""What a bundle does: predict every listed image, write the answer, compare it with the truth.

A bundle carries a copy of this file.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import nibabel as nib
import numpy as np
import torch
from monai.metrics import compute_dice
from numpy.typing import NDArray
from PIL import Image

from agssd_core.errors import DataError
from agssd_core.evaluation.bundle_prepare import Preparation, Ready
from agssd_core.evaluation.finetune_predict import Predictor

Labels = NDArray[np.uint8]
Row = dict[str, Any]


class Runner:
    """Predicts and judges the images of a list.

    Args:
        items: mappings with ``image``, ``modality`` and ``name``; where the truth is known
            ``label``, a file of structures or a class number, and ``site``.
        preparation: reads images.
        predictor: of the network.
        kind: segmentation or classification.
        names: of the structures from 1 on, or of the classes.
        output_dir: for ``predictions/``, ``predictions.csv`` and ``metrics.json``.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        preparation: Preparation,
        predictor: Predictor,
        *,
        kind: Literal["segmentation", "classification"],
        names: Sequence[str],
        output_dir: str,
    ) -> None:
        self._items, self._preparation, self._predictor = items, preparation, predictor
        self._kind, self._names, self._out = kind, tuple(names), Path(output_dir)

    def run(self) -> Row:
        """Go through the list.

        An image that cannot be used is listed with the reason, and does not stop the others.

        Returns:
            What is written to ``metrics.json``.
        """
        (self._out / "predictions").mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        failed: dict[str, str] = {}
        for item in self._items:
            try:
                ready = self._preparation(item["image"], item["modality"])
            except DataError as error:
                failed[item["name"]] = str(error)
                continue
            answer = self._segment if self._kind == "segmentation" else self._classify
            rows.append({"name": item["name"], "site": item.get("site", ""), **answer(item, ready)})
        found = {"images": len(rows), **self._summary(rows), "scans": rows, "failed": failed}
        _write_table(self._out / "predictions.csv", rows)
        text = json.dumps(found, indent=1, sort_keys=True)
        (self._out / "metrics.json").write_text(text, encoding="utf-8")
        named = [f"{name} {found[name]:.4f}" for name in _MAIN if name in found]
        sys.stdout.write(f"{len(rows)} image(s), {len(failed)} failed: {', '.join(named)}\n")
        return found

    def _segment(self, item: Mapping[str, Any], ready: Ready) -> Row:
        labels = ready.restore(self._predictor.segment(ready.image))
        file = ready.save(labels, self._out / "predictions" / item["name"])
        row: Row = {"prediction": f"predictions/{file.name}"}
        if "label" not in item:
            return row
        truth = read_labels(item["label"])
        scores = structure_dice(labels, truth, len(self._names))
        row["dice"] = float(np.mean(list(scores.values())))
        return row | {f"dice {self._names[k - 1]}": v for k, v in scores.items() if k}

    def _classify(self, item: Mapping[str, Any], ready: Ready) -> Row:
        shares = self._predictor.classify(ready.image, ready.inside)
        row: Row = {"prediction": self._names[int(shares.argmax())]}
        if "label" in item:
            row["truth"] = self._names[int(item["label"])]
        return row | {f"p {n}": float(p) for n, p in zip(self._names, shares, strict=True)}

    def _summary(self, rows: Sequence[Row]) -> Row:
        scores = [row["dice"] for row in rows if "dice" in row]
        if scores:
            return {"mean_dice": float(np.mean(scores))}
        known = [
            (row["prediction"] == row["truth"], row["truth"]) for row in rows if "truth" in row
        ]
        if not known:
            return {}
        recalls = [
            np.mean([right for right, truth in known if truth == name])
            for name in sorted({truth for _, truth in known})
        ]
        found = {"accuracy": float(np.mean([right for right, _ in known]))}
        return found | ({"balanced_accuracy": float(np.mean(recalls))} if recalls[1:] else {})


_MAIN = ("mean_dice", "accuracy", "balanced_accuracy")


def structure_dice(labels: Labels, truth: Labels, structures: int) -> dict[int, float]:
    """Dice of every structure that the truth holds, by its number.

    An empty truth gives {0: 1.0} where nothing was predicted, else {0: 0.0}.

    Raises:
        DataError: shapes differ.
    """
    if labels.shape != truth.shape:
        raise DataError(
            f"a label map has shape {truth.shape} and its image {labels.shape}, they must be "
            "equal. List the label map of the same image."
        )
    present = [k for k in range(1, structures + 1) if (truth == k).any()]
    if not present:
        return {0: float(not labels.any())}
    guess, real = (
        torch.from_numpy(np.stack([values == k for k in present])[None]).float()
        for values in (labels, truth)
    )
    scores = compute_dice(guess, real, include_background=True)[0]
    return {k: float(score) for k, score in zip(present, scores, strict=True)}


def read_labels(file: str) -> Labels:
    """Structures of NIfTI, as stored, or of an image file."""
    if file.endswith((".nii", ".nii.gz")):
        return np.asarray(cast(Any, nib).load(file).dataobj).astype(np.uint8)
    with Image.open(file) as image:
        return np.array(image)


def _write_table(file: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns or ["name"])
        writer.writeheader()
        writer.writerows(rows)
