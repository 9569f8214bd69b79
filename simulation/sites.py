"""The sites of a simulation: phantoms or folders, indexed, prepared, delineated, kept apart."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agssd_core.config import PhantomSiteConfig, RunConfig, SiteFoldersConfig, dump_config
from agssd_core.console import Bar
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.catalogue import CATALOGUE_NAME, Catalogue, open_catalogue
from agssd_core.data.frames import SiteFrames
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CatalogueError, ConfigError
from agssd_core.evaluation.us_pictures import sources_in_words
from agssd_core.weights import file_digest, write_text
from client.delineate import delineate_site
from simulation.phantoms import write_phantom_site

Say = Callable[[str], None]
LABELS_FOLDER = "labels"

DEFAULT_PHANTOMS = (
    PhantomSiteConfig(name="north-ct", modalities=("CT",), format="dicom", scanner="a"),
    PhantomSiteConfig(name="coast-mr", modalities=("MR",), spacing_mm=(4.5, 4.5, 4.0), scanner="b"),
    PhantomSiteConfig(
        name="valley-both", modalities=("CT", "MR"), size=(80, 64, 44), scanner="c", patients=6
    ),
)


def build_sites(config: RunConfig, folder: Path, *, say: Say, bar: Bar) -> dict[str, Path]:
    """Make every site of a run ready to train. What is ready is not done again.

    Args:
        config: with ``data.sites`` or, without, ``simulation.phantoms``.
        folder: where the sites' folders go.
        say: writes a line.
        bar: opens a progress bar of that title.

    Returns:
        Folder of each site that takes part in a cohort of the run, by name.

    Raises:
        ConfigError: a patient stands at more than one site, a cohort has too few sites, or the
            label maps that the run wants cannot be drawn.
        DataError: a folder is missing or holds nothing usable.
    """
    _require_label_source(config)
    if config.data.sites:
        sites = {
            entry.name: _site_of_folders(config, entry, folder / entry.name, bar=bar)
            for entry in config.data.sites
        }
    else:
        sites = {
            entry.name: _phantom_site(config, entry, folder / entry.name, bar=bar)
            for entry in _phantoms(config)
        }
    refuse_shared_patients(sites, allowed=config.simulation.allow_shared_patients)
    sites = _taking_part(config, sites, say=say)
    for name, site in sites.items():
        if site.is_relative_to(folder):
            _make_ready(config, name, site, say=say, bar=bar)
        else:
            _require_ready(config, site)  # somebody's own: used as it is, or refused
    return sites


def site_folders(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Folder of each site by name, as ``build_sites`` has made them."""
    if not config.data.sites:
        names = [entry.name for entry in _phantoms(config)]
        return {name: folder / name / "site" for name in names}
    found = {}
    for entry in config.data.sites:
        paths = _paths(entry)
        found[entry.name] = paths[0] if _is_site(paths) else folder / entry.name / "site"
    return found


def refuse_shared_patients(sites: Mapping[str, Path], *, allowed: bool) -> None:
    """Check that no patient stands at two sites, as far as their pseudonyms can be compared.

    Raises:
        ConfigError: one does, and ``allowed`` is False.
    """
    catalogues = {name: open_catalogue(site) for name, site in sites.items()}
    names = sorted(catalogues)
    found = []
    for first, second in ((a, b) for a in names for b in names if a < b):
        one, other = catalogues[first], catalogues[second]
        if one.secret_fingerprint == other.secret_fingerprint:
            shared = len(one.patients & other.patients)
            if shared:
                found.append(f"{shared} at both {first} and {second}")
    if found and not allowed:
        raise ConfigError(
            f"patients stand at more than one site ({'; '.join(found)}), so the sites are not "
            "independent. Give each patient to one site, or set "
            "simulation.allow_shared_patients=true."
        )


def _phantoms(config: RunConfig) -> tuple[PhantomSiteConfig, ...]:
    return config.simulation.phantoms or DEFAULT_PHANTOMS


def _taking_part(config: RunConfig, sites: Mapping[str, Path], *, say: Say) -> dict[str, Path]:
    """The sites with a scan for a cohort of the run.

    Raises:
        ConfigError: a cohort has fewer sites than its rounds need.
    """
    catalogues = {name: open_catalogue(site) for name, site in sites.items()}
    kept: set[str] = set()
    for cohort in config.cohorts:
        own = [name for name, found in catalogues.items() if found.patients_of(cohort)]
        least = max(1, config.for_cohort(cohort).federation.min_sites)
        if len(own) < least:
            scans = "ultrasound" if cohort == "us" else "CT or MR"
            raise ConfigError(
                f"cohort {cohort}: {len(own)} site(s) have {scans}, at least {least} must. Add "
                "such sites, lower min_sites of that cohort, or leave it out of cohorts."
            )
        kept |= set(own)
    for name in sorted(set(sites) - kept):
        say(f"{name}: takes no part, it has no scan for cohort {' or '.join(config.cohorts)}")
    return {name: site for name, site in sites.items() if name in kept}


def _make_ready(config: RunConfig, name: str, site: Path, *, say: Say, bar: Bar) -> None:
    """Prepare a site's scans and draw its label maps, and say so in one line."""
    with bar(f"Preparing {name}") as advance:
        report = prepare_site(
            site, config.data, workers=config.simulation.workers, progress=advance
        )
    catalogue = open_catalogue(site)
    reasons = sorted({item.reason for item in (*catalogue.skipped, *report.skipped)})
    if not report.ready:
        raise CatalogueError(
            f"site {name} has no usable scan, at least one is needed. Mend or replace its "
            "scans, or leave the site out." + (f" The first: {reasons[0]}" if reasons else "")
        )
    found = [(report.volumes, "volume(s)"), (report.clips, "clip(s)")]
    scans = " and ".join(f"{count} {what}" for count, what in found if count)
    drawn = ""
    if report.clips and "us" in config.cohorts:
        drawn = f"; anatomies by {_delineate(config, name, site, say=say, bar=bar)}"
    say(f"{name}: {scans} of {catalogue.patient_count} patient(s) ready{drawn}")
    for reason in reasons:
        say(f"{name}: skipped: {reason}")


def _delineate(config: RunConfig, name: str, site: Path, *, say: Say, bar: Bar) -> str:
    """Draw the label maps of a site's clips; returns who did, in words.

    Raises:
        CacheError: a clip has none.
    """
    wanted, file = config.anaus.labels, config.simulation.lpsam
    lpsam = Path(file).expanduser() if file and wanted in ("auto", "lpsam") else None
    digest = ""
    if lpsam is not None:
        digest = config.simulation.lpsam_digest or file_digest(lpsam)
    labels = site.parent / LABELS_FOLDER if wanted == "disk" else None
    with bar(f"Delineating {name}") as advance:
        report = delineate_site(
            site, config, lpsam=lpsam, digest=digest, labels=labels, progress=advance
        )
    for reason in sorted({item.reason for item in report.skipped}):
        say(f"{name}: no anatomies: {reason}")
    return sources_in_words(SiteFrames.open(site, config.data, labels=wanted).label_source)


def _require_label_source(config: RunConfig) -> None:
    """Refuse label maps that no step of the simulation can draw.

    Raises:
        ConfigError: the fitted file is missing, or maps are to come from disk and there are none.
    """
    if "us" not in config.cohorts:
        return
    wanted, file = config.anaus.labels, config.simulation.lpsam
    if wanted == "lpsam" and not file:
        raise ConfigError(
            "anaus.labels = lpsam needs a fitted file. Name it in simulation.lpsam, fit one with "
            "`agssd-sim lpsam-fit`, or use anaus.labels = superpixels."
        )
    if wanted in ("auto", "lpsam") and file and not Path(file).expanduser().is_file():
        raise ConfigError(
            "the file that simulation.lpsam names does not exist. Check its name, or leave it out "
            "for superpixels."
        )
    if wanted == "disk" and any(not _is_site(_paths(entry)) for entry in config.data.sites):
        raise ConfigError(
            "anaus.labels = disk works with phantoms and with indexed sites. Prepare the folders "
            "with `agssd-site`, give them label maps with `agssd-site delineate --labels DIR`, and "
            "name the prepared sites."
        )


def _require_ready(config: RunConfig, site: Path) -> None:
    """Open a site that was prepared elsewhere as its cohorts will.

    Raises:
        CacheError: its scans were prepared with other settings, or have no label maps.
    """
    catalogue = open_catalogue(site)
    if "ct-mr" in config.cohorts and catalogue.records:
        SiteVolumes.open(site, config.data)
    if "us" in config.cohorts and catalogue.clips:
        SiteFrames.open(site, config.data, labels=config.anaus.labels)


def _secret(config: RunConfig) -> bytes:
    # Volumes are ordered by pseudonym, so the secret is part of the bits of a run. Sites of one
    # simulation share it: that is how a patient at two of them is found.
    return hashlib.sha256(f"simulation/{config.seed}".encode()).digest()


def _phantom_site(config: RunConfig, entry: PhantomSiteConfig, folder: Path, *, bar: Bar) -> Path:
    raw, site, mark = folder / "raw", folder / "site", folder / "phantoms.json"
    labels = folder / LABELS_FOLDER if config.anaus.labels == "disk" else None
    wanted = json.dumps(
        {
            "seed": config.seed,
            "site": json.loads(dump_config(entry)),
            "labels": labels is not None,
        }
    )
    if not mark.is_file() or mark.read_text() != wanted:
        with bar(f"Inventing {entry.name}") as advance:
            write_phantom_site(raw, entry, seed=config.seed, labels_folder=labels)
            advance(entry.patients, entry.patients)
        write_text(mark, wanted)
    with bar(f"Indexing {entry.name}") as advance:
        index_folders(site, [raw], secret=_secret(config), progress=advance)
    return site


def _site_of_folders(
    config: RunConfig, entry: SiteFoldersConfig, folder: Path, *, bar: Bar
) -> Path:
    paths = _paths(entry)
    if _is_site(paths):
        _require_whole(entry, open_catalogue(paths[0]))
        return paths[0]
    selection = Selection(
        modalities=entry.modalities, patients=entry.patients, vendors=entry.vendors
    )
    site = folder / "site"
    with bar(f"Indexing {entry.name}") as advance:
        index_folders(site, paths, secret=_secret(config), selection=selection, progress=advance)
    return site


def _paths(entry: SiteFoldersConfig) -> list[Path]:
    return [Path(path).expanduser() for path in entry.paths]


def _is_site(paths: Sequence[Path]) -> bool:
    made = [path for path in paths if (path / CATALOGUE_NAME).is_file()]
    if made and len(paths) > 1:
        raise CatalogueError(
            f"{len(made)} of {len(paths)} folders of a site is already an indexed site, which must "
            "stand alone. Name either one indexed site or folders of raw scans."
        )
    return bool(made)


def _require_whole(entry: SiteFoldersConfig, catalogue: Catalogue) -> None:
    left_out = {scan.modality for scan in catalogue.scans} - set(entry.modalities)
    if entry.patients or entry.vendors or left_out:
        raise ConfigError(
            f"data.sites: {entry.name} is an indexed site, which is taken whole. Leave out "
            "modalities, patients and vendors, or name its raw folders instead."
        )
