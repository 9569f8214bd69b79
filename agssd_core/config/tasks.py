"""Downstream tasks: what a frozen or fine-tuned encoder is judged by."""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, ScanModality, name_problem, require


class TaskConfig(Node):
    """One question to labelled scans.

    Attributes:
        kind: ``classification`` of a scan, or ``segmentation`` of one structure or all.
        label: of a classification: which of a scan's labels.
        classes: of a classification: the labels that count, in order; empty takes those found.
        structures: of a segmentation: mask values that count as classes 1, 2, ...; empty takes
            every value above 0 as one structure.
        modalities: scans of others are left out.
        unlabelled: of a segmentation: whether scans in which nothing is outlined take part.
    """

    name: str
    kind: Literal["classification", "segmentation"]
    label: str = ""
    classes: tuple[str, ...] = ()
    structures: tuple[int, ...] = ()
    modalities: tuple[ScanModality, ...] = ("CT", "MR", "US")
    unlabelled: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                name_problem(self.name),
                f"task {self.name}: a classification needs the name of its label."
                if self.kind == "classification" and not self.label
                else "",
                f"task {self.name}: one class alone cannot be told apart. Name two or more."
                if len(self.classes) == 1
                else "",
                f"task {self.name}: structures are mask values above 0."
                if any(not 0 < value < 256 for value in self.structures)
                else "",
            ]
        )
        return self
