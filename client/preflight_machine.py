"""Whether this machine can carry out a run: versions, GPU, scans, memory, disk."""

import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from agssd_core.config import Cohort, RunConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import AgssdError
from client.preflight_row import Row, fail, ok, warn
from client.preflight_step import Estimate, estimate_memory

PACKAGE = "agssd-federation"
_DRIVER = Path("/proc/driver/nvidia/version")
_GB = 1e9
_ROUNDS_ON_DISK, _COPIES = 2, 3  # student and teacher thrice: reply, optimiser's moments, base
_LEAST_FREE = 2 * _GB


def machine_rows(site: Path, config: RunConfig, *, measure: bool) -> Iterator[Row]:
    """All checks of the machine; ``measure`` takes training steps for the memory."""
    yield check_gpu(config)
    estimates: list[Estimate] = []
    for cohort in _cohorts(site, config):
        own = config.for_cohort(cohort)
        data = check_data(site, own)
        yield data
        if measure and data.level != "fail":
            estimate = estimate_memory(site, own, batch=batch_of_a_pass(own))
            yield check_memory(own, estimate, available=memory_of_device(own))
            estimates += [] if estimate is None else [estimate]
    if not _cohorts(site, config):
        yield _without_scans(site)
    yield check_disk(site, shared=sum(each.shared for each in estimates))


def check_versions(constraints: Path | None = None) -> Row:
    """Whether the installed packages are within what this version needs.

    Args:
        constraints: a list of the very versions that were tested (NAME==VERSION lines).
    """
    name, wrong = "packages", []
    for text in requires(PACKAGE) or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        if found is None or not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found or 'missing'} (needs {needed.specifier})")
    if wrong:
        return fail(
            name,
            ", ".join(wrong),
            f"Install {PACKAGE} {version(PACKAGE)} anew with `pip install -c constraints.txt`.",
        )
    other = _other_versions(constraints) if constraints is not None else []
    if other:
        return warn(
            name,
            f"{len(other)} are not the tested versions: {', '.join(other[:4])}",
            "Install with `pip install -c constraints.txt`.",
        )
    tested = " and the tested ones" if constraints is not None else ""
    return ok(name, f"{PACKAGE} {version(PACKAGE)}; all as it needs{tested}")


def check_gpu(config: RunConfig) -> Row:
    """Whether there is a GPU that training can use."""
    import torch

    name = "GPU"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        shown = ", ".join(f"{one.name} {one.total_memory / _GB:.0f} GB" for one in found)
        return ok(name, f"{shown}; driver {_driver() or 'unknown'}, CUDA {torch.version.cuda}")
    built = torch.version.cuda
    why = "this torch is built without CUDA" if built is None else f"CUDA {built} finds none"
    remedy = (
        "On a machine with an NVIDIA GPU install torch with CUDA."
        if built is None
        else "Install or update the NVIDIA driver"
        f"{f' (version {_driver()} is loaded)' if _driver() else ''}."
    )
    if config.training.device == "cuda":
        return fail(name, f"none, and training.device = cuda; {why}", remedy)
    return warn(name, f"none; training runs on {psutil.cpu_count()} CPUs; {why}", remedy)


def check_data(site: Path, config: RunConfig) -> Row:
    """Whether a cohort's scans are prepared as the run needs them, and can be read."""
    cohort = config.federation.cohort
    name = f"data {cohort}"
    try:
        count, kind = _read_one(site, config)
        patients = len(open_catalogue(site).patients_of(cohort))
    except AgssdError as error:
        fact, _, remedy = str(error).partition(". ")
        return fail(name, fact.rstrip("."), remedy)
    except OSError as error:
        return fail(
            name,
            f"prepared scans cannot be read ({error.strerror})",
            "Mend permissions or the disk, then `agssd-site prepare SITE --verify`.",
        )
    return ok(name, f"{count} {kind} of {patients} patient(s) are prepared")


def check_memory(
    config: RunConfig, estimate: Estimate | None, *, available: tuple[float, str]
) -> Row:
    """Whether the configured batch fits.

    Args:
        config: of one cohort.
        estimate: None when no step could be taken in time.
        available: bytes, and of what.
    """
    name, (free, where) = f"memory {config.federation.cohort}", available
    if estimate is None:
        return warn(
            name,
            "not measured: a small step on the CPU failed or took too long",
            "Watch the memory of the first round.",
        )
    how = "measured" if estimate.exact else "estimated from smaller steps"
    batch = batch_of_a_pass(config)
    said = (
        f"a pass of {batch} takes about {estimate.needed / _GB:.2g} GB ({how} on the CPU), "
        f"{free / _GB:.1f} GB {where}"
    )
    remedy = (
        "Tell the coordinator; training.accumulate or activation_checkpointing need less memory, "
        "and this machine more."
    )
    if estimate.needed > free:
        return fail(name, said, remedy)
    return warn(name, said, remedy) if estimate.needed > 0.8 * free else ok(name, said)


def check_disk(site: Path, *, shared: int) -> Row:
    """Whether what a site keeps of two rounds fits on its disk.

    Args:
        site: its folder.
        shared: bytes of student, teacher and state over all cohorts; 0 is unknown.
    """
    free = shutil.disk_usage(site).free
    needed = _ROUNDS_ON_DISK * _COPIES * shared
    said = f"{free / _GB:.1f} GB free"
    if shared:
        said += f", a run keeps about {needed / _GB:.2g} GB"
    remedy = "Free disk space, or move the site's folder to a larger disk."
    if free < needed:
        return fail("disk", said, remedy)
    return warn("disk", said, remedy) if free < max(2 * needed, _LEAST_FREE) else ok("disk", said)


def batch_of_a_pass(config: RunConfig) -> int:
    """Images that one process holds at once."""
    if config.federation.cohort == "us":
        return config.anaus.batch_size
    from agssd_core.training.worker import visible_processes

    training = config.training
    return max(1, training.batch_size // (visible_processes(config) * training.accumulate))


def memory_of_device(config: RunConfig) -> tuple[float, str]:
    """Bytes that training may take, and of what."""
    import torch

    if config.training.device != "cpu" and torch.cuda.is_available():
        sizes = [
            torch.cuda.get_device_properties(number).total_memory
            for number in range(torch.cuda.device_count())
        ]
        return float(min(sizes)), "on the smallest GPU"
    return float(psutil.virtual_memory().available), "free here"


def _cohorts(site: Path, config: RunConfig) -> list[Cohort]:
    """Those of the run that the site has scans for."""
    try:
        held = open_catalogue(site).cohorts
    except AgssdError:
        return []
    return [cohort for cohort in config.cohorts if cohort in held]


def _without_scans(site: Path) -> Row:
    try:
        held = ", ".join(open_catalogue(site).cohorts)
    except AgssdError as error:
        fact, _, remedy = str(error).partition(". ")
        return fail("data", fact.rstrip("."), remedy)
    return fail(
        "data",
        f"no scan for the run's cohorts; the site has {held or 'none'}",
        "Index such scans with `agssd-site index`, or name the right run with --config.",
    )


def _read_one(site: Path, config: RunConfig) -> tuple[int, str]:
    """How many scans are prepared, after reading a part of one."""
    if config.federation.cohort == "us":
        from agssd_core.data.frames import SiteFrames

        frames = SiteFrames.open(site, config.data, labels=config.anaus.labels)
        frames.read_frame(0)
        return len(frames), "frame(s)"
    from agssd_core.data.cache import SiteVolumes

    volumes = SiteVolumes.open(site, config.data)
    volumes.read_crop(0, (0, 0, 0), (1, 1, 1))
    return len(volumes), "volume(s)"


def _driver() -> str:
    try:
        found = re.search(r"Module\s+([\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found.group(1) if found else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _other_versions(constraints: Path) -> list[str]:
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = [
        line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.+!-]+", line.strip())
    ]
    installed = [(name, wanted.strip(), _version(name)) for name, wanted in pairs]
    return [
        f"{name} {found} (tested {wanted})"
        for name, wanted, found in installed
        if found is not None and found.split("+")[0] != wanted.split("+")[0]
    ]
