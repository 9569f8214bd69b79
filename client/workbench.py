"""The real workbench: the site's catalogue, its prepared scans, AG-SSD and ANAUS training."""

from pathlib import Path

from agssd_core.config import Cohort, RunConfig
from agssd_core.data.catalogue import open_catalogue
from client.contracts import SiteFacts, Trainer


class AgssdWorkbench:
    """Opens what ``agssd-site index`` and ``agssd-site prepare`` made."""

    def facts(self, folder: Path, cohort: Cohort) -> SiteFacts:
        """Count a cohort's patients, and its volumes or clips."""
        catalogue = open_catalogue(folder)
        return SiteFacts(len(catalogue.patients_of(cohort)), catalogue.scan_count(cohort))

    def trainer(self, folder: Path, config: RunConfig, *, site: str) -> Trainer:
        """Open the cohort's scans and build its model and optimiser.

        This is where torch is imported. A ``hello`` must be cheap: Flower starts a new process
        for every message.

        Raises:
            CacheError: the scans were prepared with other settings, or not at all.
            TrainingError: the configured devices are not there.
        """
        federation = config.federation
        sites = federation.sites_per_round or federation.expected_sites or 1
        if federation.cohort == "us":
            return _of_frames(folder, config, site=site, sites=sites)
        return _of_volumes(folder, config, site=site, sites=sites)


def _of_volumes(folder: Path, config: RunConfig, *, site: str, sites: int) -> Trainer:
    """AG-SSD in this process, or in a process for each GPU."""
    from agssd_core.data.cache import SiteVolumes
    from agssd_core.training.process_trainer import ProcessTrainer
    from agssd_core.training.site_round import SiteTrainer
    from agssd_core.training.worker import visible_processes

    volumes = SiteVolumes.open(folder, config.data)
    processes = visible_processes(config)
    if processes > 1:
        return ProcessTrainer(config, folder, site=site, processes=processes, sites=sites)
    return SiteTrainer(config, volumes, site=site, sites=sites)


def _of_frames(folder: Path, config: RunConfig, *, site: str, sites: int) -> Trainer:
    """ANAUS, in this process."""
    from agssd_core.data.frames import SiteFrames
    from agssd_core.training.anaus_round import AnausTrainer

    frames = SiteFrames.open(folder, config.data, labels=config.anaus.labels)
    return AnausTrainer(config, frames, site=site, sites=sites)
