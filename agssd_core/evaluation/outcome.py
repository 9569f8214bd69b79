"""How well scans were classified or segmented: per scan, per site, and in all."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What one model reached on the held-out scans of one task.

    Attributes:
        metrics: over all scans. Classification: ``accuracy``, ``balanced_accuracy``, ``auc``.
            Segmentation: ``dice`` (mean over structures and scans) and ``hd95_mm`` (pixels where
            a scan has no spacing). A metric that is not defined is left out, never NaN.
        per_site: the same for the scans of each site; a site without a held-out scan is absent.
        scans: held-out scans of each site.
    """

    metrics: Mapping[str, float]
    per_site: Mapping[str, Mapping[str, float]]
    scans: Mapping[str, int]

    @property
    def main(self) -> str:
        """The metric that arms are compared by."""
        return "dice" if "dice" in self.metrics else "balanced_accuracy"

    @property
    def worst_site(self) -> tuple[str, float] | None:
        """Site with the lowest main metric; None where fewer than two sites have one."""
        found = {
            site: values[self.main] for site, values in self.per_site.items() if self.main in values
        }
        if len(found) < 2:
            return None
        worst = min(sorted(found), key=lambda site: found[site])
        return worst, found[worst]
