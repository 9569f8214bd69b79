"""The real workbench: the site's catalogue, its prepared volumes, AG-SSD training."""

from pathlib import Path

from agssd_core.config import RunConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.catalogue import open_catalogue
from client.site import SiteFacts, Trainer


class AgssdWorkbench:
    """Opens what ``agssd-site index`` and ``agssd-site prepare`` made."""

    def facts(self, folder: Path) -> SiteFacts:
        """Count patients and volumes."""
        catalogue = open_catalogue(folder)
        return SiteFacts(catalogue.patient_count, len(catalogue.records))

    def trainer(self, folder: Path, config: RunConfig, *, site: str) -> Trainer:
        """Open volumes, build model and optimiser, or leave that to a process for each GPU.

        This is where torch is imported. A ``hello`` must be cheap: Flower starts a new process
        for every message.

        Raises:
            CacheError: the volumes were prepared with other settings, or not at all.
            TrainingError: the configured devices are not there.
        """
        from agssd_core.training.process_trainer import ProcessTrainer
        from agssd_core.training.site_round import SiteTrainer
        from agssd_core.training.worker import visible_processes

        volumes = SiteVolumes.open(folder, config.data)
        federation = config.federation
        sites = federation.sites_per_round or federation.expected_sites or 1
        processes = visible_processes(config)
        if processes > 1:
            return ProcessTrainer(config, folder, site=site, processes=processes, sites=sites)
        return SiteTrainer(config, volumes, site=site, sites=sites)
