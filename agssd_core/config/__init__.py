"""Frozen configuration nodes and the one way to read them."""

from agssd_core.config.agssd import (
    AgssdConfig,
    CvaaConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    TargetConfig,
    TeacherConfig,
)
from agssd_core.config.anaus import AnausConfig
from agssd_core.config.central_privacy import CentralPrivacyConfig
from agssd_core.config.data import DataConfig, SiteFoldersConfig
from agssd_core.config.federation import (
    COHORT_OF,
    Cohort,
    FederationConfig,
    MergeConfig,
    StudentRule,
    TeacherRule,
)
from agssd_core.config.frames import FramesConfig
from agssd_core.config.init import InitConfig
from agssd_core.config.load import config_from_json, dump_config, load_config, parse_config
from agssd_core.config.lpsam import LpsamConfig
from agssd_core.config.presets import PRESETS
from agssd_core.config.privacy import PrivacyConfig
from agssd_core.config.run import RunConfig
from agssd_core.config.simulation import (
    PhantomSiteConfig,
    SimulationConfig,
)
from agssd_core.config.tasks import TaskConfig
from agssd_core.config.training import (
    MonitorConfig,
    OptimiserConfig,
    TrackingConfig,
    TrainingConfig,
)
from agssd_core.config.views import AugmentConfig, CvacConfig, EaamConfig

__all__ = [
    "COHORT_OF",
    "PRESETS",
    "AgssdConfig",
    "AnausConfig",
    "AugmentConfig",
    "CentralPrivacyConfig",
    "Cohort",
    "CvaaConfig",
    "CvacConfig",
    "DataConfig",
    "EaamConfig",
    "FederationConfig",
    "FramesConfig",
    "HeadConfig",
    "InitConfig",
    "LossConfig",
    "LpsamConfig",
    "MergeConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimiserConfig",
    "PhantomSiteConfig",
    "PrivacyConfig",
    "RunConfig",
    "SimulationConfig",
    "SiteFoldersConfig",
    "StudentRule",
    "TargetConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeacherRule",
    "TrackingConfig",
    "TrainingConfig",
    "config_from_json",
    "dump_config",
    "load_config",
    "parse_config",
]
