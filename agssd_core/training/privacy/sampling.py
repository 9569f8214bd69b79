"""Who takes part in a step: every patient for itself, with the same probability.

Everything else that is random about a patient's views (volume, crops, hidden tokens) is drawn
from (seed, site, step, patient), so who else takes part changes nothing for anybody.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agssd_core.noise import NoiseStream
from agssd_core.views.seeds import rng_for


class OfPatient(Protocol):
    """A scan that says whose it is."""

    @property
    def patient(self) -> str:
        """Pseudonym; all scans of one patient bear the same."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Some patients of one step that pass through the network together.

    Attributes:
        step: global step.
        patients: pseudonyms; none in the one chunk of a step that drew nobody.
        scans: one of each patient's scans, as indices into the site's.
        last: whether the step ends with it.
    """

    step: int
    patients: tuple[str, ...]
    scans: tuple[int, ...]
    last: bool


class PatientSampler:
    """A site's patients and their scans.

    Args:
        scans: the site's scans.
        seed, site: of the run.
        physical_batch: most patients of a chunk.
    """

    def __init__(
        self, scans: Sequence[OfPatient], *, seed: int, site: str, physical_batch: int
    ) -> None:
        held: dict[str, list[int]] = {}
        for index, scan in enumerate(scans):
            held.setdefault(scan.patient, []).append(index)
        self._held = dict(sorted(held.items()))
        self._seed, self._site, self._most = seed, site, physical_batch

    def __len__(self) -> int:
        """Patients of the site."""
        return len(self._held)

    def draw(self, steps: range, *, rate: float, stream: NoiseStream) -> Iterator[Chunk]:
        """Poisson sampling: the chunks of every step, at least one a step.

        Source:
            Abadi et al. 2016, arXiv:1607.00133; Poisson as Mironov et al. 2019, arXiv:1908.10530.
        """
        names = list(self._held)
        for step in steps:
            # The stream's numbers are in (0, 1], so a rate of 1 takes everybody, 0 nobody.
            taken = stream.uniform(len(names)) <= rate
            chosen = [name for name, takes in zip(names, taken, strict=True) if takes]
            yield from self._chunks(step, chosen)

    def _chunks(self, step: int, chosen: list[str]) -> Iterator[Chunk]:
        starts = range(0, max(1, len(chosen)), self._most)
        for start in starts:
            part = tuple(chosen[start : start + self._most])
            scans = tuple(self._scan_of(name, step) for name in part)
            yield Chunk(step, part, scans, last=start == starts[-1])

    def _scan_of(self, patient: str, step: int) -> int:
        own = self._held[patient]
        return own[int(rng_for(self._seed, self._site, "scan", step, patient).integers(len(own)))]
