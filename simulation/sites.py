"""The sites of a simulation: phantoms or folders, indexed and prepared, patients kept apart."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from agssd_core.config import PhantomSiteConfig, RunConfig, SiteFoldersConfig, dump_config
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.catalogue import CATALOGUE_NAME, open_catalogue
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CatalogueError, ConfigError
from agssd_core.weights import write_text
from simulation.phantoms import write_phantom_site

Say = Callable[[str], None]
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

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
        Folder of each site by name.

    Raises:
        ConfigError: a patient stands at more than one site.
        DataError: a folder is missing or holds nothing usable.
    """
    if config.data.sites:
        sites = {
            entry.name: _site_of_folders(config, entry, folder / entry.name, bar=bar)
            for entry in config.data.sites
        }
    else:
        phantoms = config.simulation.phantoms or DEFAULT_PHANTOMS
        sites = {
            entry.name: _phantom_site(config, entry, folder / entry.name, bar=bar)
            for entry in phantoms
        }
    refuse_shared_patients(sites, allowed=config.simulation.allow_shared_patients)
    for name, site in sites.items():
        if not site.is_relative_to(folder):
            SiteVolumes.open(site, config.data)  # somebody's own: used as it is, or refused
            continue
        with bar(f"Preparing {name}") as advance:
            report = prepare_site(
                site, config.data, workers=config.simulation.workers, progress=advance
            )
        catalogue = open_catalogue(site)
        say(f"{name}: {report.ready} volume(s) of {catalogue.patient_count} patient(s) ready")
        reasons = sorted({item.reason for item in (*catalogue.skipped, *report.skipped)})
        for reason in reasons:
            say(f"{name}: skipped: {reason}")
        if not report.ready:
            raise CatalogueError(
                f"site {name} has no usable volume, at least one is needed. Mend or replace its "
                "scans, or leave the site out." + (f" The first: {reasons[0]}" if reasons else "")
            )
    return sites


def site_folders(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Folder of each site by name, as ``build_sites`` has made them."""
    if not config.data.sites:
        names = [entry.name for entry in config.simulation.phantoms or DEFAULT_PHANTOMS]
        return {name: folder / name / "site" for name in names}
    found = {}
    for entry in config.data.sites:
        paths = [Path(path).expanduser() for path in entry.paths]
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


def _secret(config: RunConfig) -> bytes:
    # Volumes are ordered by pseudonym, so the secret is part of the bits of a run. Sites of one
    # simulation share it: that is how a patient at two of them is found.
    return hashlib.sha256(f"simulation/{config.seed}".encode()).digest()


def _phantom_site(config: RunConfig, entry: PhantomSiteConfig, folder: Path, *, bar: Bar) -> Path:
    raw, site, mark = folder / "raw", folder / "site", folder / "phantoms.json"
    wanted = json.dumps({"seed": config.seed, "site": json.loads(dump_config(entry))})
    if not mark.is_file() or mark.read_text() != wanted:
        with bar(f"Inventing {entry.name}") as advance:
            write_phantom_site(raw, entry, seed=config.seed)
            advance(entry.patients, entry.patients)
        write_text(mark, wanted)
    with bar(f"Indexing {entry.name}") as advance:
        index_folders(site, [raw], secret=_secret(config), progress=advance)
    return site


def _site_of_folders(
    config: RunConfig, entry: SiteFoldersConfig, folder: Path, *, bar: Bar
) -> Path:
    paths = [Path(path).expanduser() for path in entry.paths]
    if _is_site(paths):
        _require_whole(entry)
        return paths[0]
    selection = Selection(
        modalities=entry.modalities, patients=entry.patients, vendors=entry.vendors
    )
    site = folder / "site"
    with bar(f"Indexing {entry.name}") as advance:
        index_folders(site, paths, secret=_secret(config), selection=selection, progress=advance)
    return site


def _is_site(paths: Sequence[Path]) -> bool:
    made = [path for path in paths if (path / CATALOGUE_NAME).is_file()]
    if made and len(paths) > 1:
        raise CatalogueError(
            f"{len(made)} of {len(paths)} folders of a site is already an indexed site, which must "
            "stand alone. Name either one indexed site or folders of raw scans."
        )
    return bool(made)


def _require_whole(entry: SiteFoldersConfig) -> None:
    if entry.patients or entry.vendors or len(entry.modalities) < 2:
        raise ConfigError(
            f"data.sites: {entry.name} is an indexed site, which is taken whole. Leave out "
            "modalities, patients and vendors, or name its raw folders instead."
        )
