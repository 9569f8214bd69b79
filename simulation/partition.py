"""Give the patients of a data set to simulated sites, and hold some of them out.

Always whole patients: none stands at two sites or on both sides of the split. The order of the
rows changes nothing, and the same seed gives the same hands.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agssd_core.errors import ConfigError, DataError
from agssd_core.views.seeds import rng_for
from simulation.datasets.rows import Row

Split = Literal["train", "test"]
Patients = Mapping[str, Sequence[Row]]
OFFICIAL_TEST = ("validation", "test")
UNKNOWN = "unknown"
# Ways of dividing in which a site is pure: other scans of a patient are left out.
PURE = ("vendor", "modality", "modality+vendor")


@dataclass(frozen=True)
class Placed:
    """A scan, the simulated site that holds it, and its side of the split."""

    row: Row
    site: str
    split: Split


def partition(
    rows: Sequence[Row],
    *,
    by: str,
    sites: int | None = None,
    seed: int = 0,
    folds: int = 5,
    fold: int = 0,
    official: bool = True,
) -> tuple[Placed, ...]:
    """Divide scans over sites.

    Args:
        rows: of one data set.
        by: ``site``, ``vendor``, ``modality``, ``modality+vendor`` or ``fact:NAME`` for a natural
            division, where scans that do not say it are of the site ``unknown``;
            ``dirichlet:ALPHA[:LABEL]`` skews labels over ``sites`` sites, ``quantity:ALPHA`` their
            sizes (Dirichlet with that concentration; small is uneven).
        sites: of a drawn division how many; of a natural one the largest so many, the scans of
            the others are left out.
        seed: of every draw.
        folds: patients are held out by folds; 0 holds out none but those of an official test set.
        fold: which, from 0.
        official: hold out the data set's own test and validation patients. No fold is held out
            beside them, unless their answers are not published (no masks or labels where the
            others have some). False takes them for patients like any other.

    Returns:
        Placed scans in the order of their names. For ``vendor`` and ``modality`` a patient with
        scans of several kinds keeps those of the site that it is given to.

    Raises:
        ConfigError: the division cannot be made.
        DataError: two rows have one name, or a row names no patient.
    """
    _check(rows, sites=sites, folds=folds, fold=fold)
    patients: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.scan):
        patients[row.patient].append(row)
    kind, _, rest = by.partition(":")
    keys: dict[str, str] = {}
    if kind in ("dirichlet", "quantity"):
        homes = _drawn(patients, kind, rest, sites=sites, seed=seed)
    else:
        keys = _keys(rows, by)
        homes = _natural(patients, keys, by, sites=sites, seed=seed)
    held = _held_out(patients, homes, seed=seed, folds=folds, fold=fold, official=official)
    placed = [
        Placed(row, homes[patient], "test" if patient in held else "train")
        for patient, own in patients.items()
        if patient in homes
        for row in own
        if by not in PURE or keys[row.scan] == homes[patient]
    ]
    return tuple(sorted(placed, key=lambda item: item.row.scan))


def _check(rows: Sequence[Row], *, sites: int | None, folds: int, fold: int) -> None:
    if folds == 1 or (folds and not 0 <= fold < folds):
        raise ConfigError(
            f"fold {fold} of {folds} cannot be held out. Use two folds or more and count from 0, "
            "or folds 0 to hold out none."
        )
    if sites is not None and sites < 1:
        raise ConfigError(f"{sites} sites were asked for, at least one must be. Ask for more.")
    twice = len(rows) - len({row.scan for row in rows})
    nameless = sum(not row.patient or not row.scan for row in rows)
    if twice or nameless:
        raise DataError(
            f"{twice} scan(s) stand twice and {nameless} have no name or patient, none may. Give "
            "each scan its own name; a scan of nobody known is its own patient."
        )


def _keys(rows: Sequence[Row], by: str) -> dict[str, str]:
    """Scan -> its natural site, as a site's name."""
    texts = {row.scan: _text(row, by) for row in rows}
    if by.startswith("fact:") and rows and not any(texts.values()):
        known = sorted({name for row in rows for name in row.facts})
        raise ConfigError(
            f"no scan says what --by {by} asks for. Facts of this data set: "
            f"{', '.join(known) or 'none'}. Name one of them, or divide by something else."
        )
    names = site_names(texts.values())
    return {scan: names[text] for scan, text in texts.items()}


def _text(row: Row, by: str) -> str:
    if by == "modality+vendor":
        return f"{row.modality}-{row.vendor or UNKNOWN}"
    if by in ("site", "vendor", "modality"):
        return str(getattr(row, by))
    if by.startswith("fact:"):
        return row.facts.get(by.removeprefix("fact:"), "")
    raise ConfigError(
        f"--by {by} is not known. Use site, vendor, modality, modality+vendor, fact:NAME, "
        "dirichlet:ALPHA or quantity:ALPHA."
    )


def site_name(text: str) -> str:
    """A text as a site's name: letters, digits and hyphens, 40 at most."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:40].strip("-")
    return plain or UNKNOWN


def site_names(texts: Iterable[str]) -> dict[str, str]:
    """Names for all sites of a data set; two texts never share one.

    Where they would (``Zürich`` and ``Zérich``), each gets a few digits of its digest.
    """
    names = {text: site_name(text) for text in set(texts)}
    # Folders of sites may lie where capital letters make no difference.
    uses = Counter(name.casefold() for name in names.values())
    for text, name in names.items():
        if text and uses[name.casefold()] > 1:
            digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
            names[text] = f"{name[:33].strip('-')}-{digest[:6]}"
    return names


def _natural(
    patients: Patients, keys: Mapping[str, str], by: str, *, sites: int | None, seed: int
) -> dict[str, str]:
    kinds = {name: Counter(keys[row.scan] for row in own) for name, own in patients.items()}
    homes: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    # Patients with the fewest choices first, the others where fewest are: sites come out even.
    order = rng_for(seed, "partition", by).permutation(sorted(kinds)).tolist()
    for name in sorted(order, key=lambda patient: len(kinds[patient])):
        found = kinds[name]
        if by in PURE:
            home = min(sorted(found), key=lambda site: sizes[site])
        else:
            home = max(sorted(found), key=lambda site: found[site])
        homes[name] = home
        sizes[home] += 1
    if sites is not None:
        if sites > len(sizes):
            raise ConfigError(
                f"--by {by} gives {len(sizes)} site(s), {sites} were asked for. Ask for fewer."
            )
        kept = sorted(sizes, key=lambda site: (-sizes[site], site))[:sites]
        homes = {patient: home for patient, home in homes.items() if home in kept}
    return homes


def _drawn(
    patients: Patients, kind: str, rest: str, *, sites: int | None, seed: int
) -> dict[str, str]:
    alpha, label = _alpha(kind, rest)
    if not sites or sites > len(patients):
        raise ConfigError(
            f"--by {kind} needs --sites, from 1 to the {len(patients)} patients that there are."
        )
    classes: dict[str, list[str]] = defaultdict(list)
    label = label if kind == "quantity" else _label(patients, label)
    for name, own in sorted(patients.items()):
        classes[_class_of(own, label) if kind == "dirichlet" else ""].append(name)
    width = len(str(sites))
    names = [f"site-{number + 1:0{width}d}" for number in range(sites)]
    rng = rng_for(seed, "partition", kind, rest, sites)
    homes = {}
    for _, members in sorted(classes.items()):
        shares = rng.dirichlet(np.full(sites, alpha))
        edges = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
        hands = np.split(rng.permutation(members), edges)
        for site, hand in zip(names, hands, strict=True):
            homes.update(dict.fromkeys(hand.tolist(), site))
    return _without_empty(homes, names)


def _without_empty(homes: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Give an empty site one patient of the largest."""
    for site in names:
        if site not in homes.values():
            sizes = Counter(homes.values())
            largest = max(sorted(sizes), key=lambda name: sizes[name])
            homes[min(patient for patient, home in homes.items() if home == largest)] = site
    return homes


def _alpha(kind: str, rest: str) -> tuple[float, str]:
    number, _, label = rest.partition(":")
    try:
        alpha = float(number)
    except ValueError:
        alpha = 0.0
    if not 1e-3 <= alpha <= 1e6:
        raise ConfigError(
            f"--by {kind} needs a concentration from 0.001 to 1000000, as in {kind}:0.5."
        )
    return alpha, label


def _label(patients: Patients, wanted: str) -> str:
    known = sorted({name for own in patients.values() for row in own for name in row.labels})
    if wanted in known:
        return wanted
    if wanted or len(known) != 1:
        raise ConfigError(
            f"--by dirichlet needs one of the labels {', '.join(known) or '(there are none)'}. "
            "Name it as in dirichlet:0.5:LABEL, or use quantity:ALPHA."
        )
    return known[0]


def _class_of(rows: Sequence[Row], label: str) -> str:
    """A patient's most frequent class."""
    found = Counter(row.labels.get(label, "") for row in rows)
    return max(sorted(found), key=lambda name: found[name])


def _held_out(
    patients: Patients,
    homes: Mapping[str, str],
    *,
    seed: int,
    folds: int,
    fold: int,
    official: bool,
) -> set[str]:
    """Patients of the official test set, or else of one fold of every site and class."""
    named = (
        {name for name in homes if any(row.split in OFFICIAL_TEST for row in patients[name])}
        if official
        else set()
    )
    others = homes.keys() - named
    answered = _answers(patients, named) >= _answers(patients, others)
    if not folds or (named and answered):
        return named
    held = set(named)
    for site in sorted(set(homes.values())):
        members = sorted(name for name in others if homes[name] == site)
        shuffled = rng_for(seed, "held-out", site).permutation(members).tolist()
        # Classes side by side: dealing them out in turn spreads each over the folds.
        dealt = sorted(shuffled, key=lambda name: _classes(patients[name]))
        if len(members) > 1:
            # A site of few patients has one on either side in every fold.
            held.update(dealt[fold::folds] or [dealt[fold % len(dealt)]])
    return held


def _answers(patients: Patients, names: Collection[str]) -> set[str]:
    """What is known of these patients' scans: names of labels, and whether there are masks."""
    rows = [row for name in names for row in patients[name]]
    labels = {f"label {label}" for row in rows for label in row.labels}
    return labels | {"masks" for row in rows if row.masks}


def _classes(rows: Sequence[Row]) -> str:
    return "/".join(
        sorted({f"{name}={value}" for row in rows for name, value in row.labels.items()})
    )
