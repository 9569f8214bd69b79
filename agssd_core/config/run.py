"""The whole configuration of a run, and the presets that it may start from."""

import re
from typing import Any, Literal, Self

from pydantic import model_validator

from agssd_core.config.agssd import AgssdConfig
from agssd_core.config.data import DataConfig
from agssd_core.config.federation import FederationConfig
from agssd_core.config.node import Node, require, within
from agssd_core.config.simulation import SimulationConfig
from agssd_core.config.training import MonitorConfig, TrackingConfig, TrainingConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "agssd": {
            "model": {
                "patch_size": 8,
                "width": 48,
                "depth": 2,
                "heads": 4,
                "pos_embed": "sincos",
                "drop_path": 0.0,
                "decoder": "transformer",
            },
            "cvac": {"global_size": [32, 32, 32], "local_size": [16, 16, 16], "n_local": 2},
            "cvaa": {"min_inner": 4},
            "head": {"prototypes": 128, "hidden": 256, "bottleneck": 64},
            "teacher": {"ema_momentum": 0.99},
        },
        "training": {"optimiser": {"learning_rate": 2e-3}},
        "data": {"spacing_mm": [3.0, 3.0, 3.0], "chunk": 32, "foreground_margin": 4},
    },
    "small": {},
    "base": {
        "agssd": {
            "model": {"width": 768, "depth": 12, "heads": 12},
            "head": {"prototypes": 8192},
        }
    },
}


class RunConfig(Node):
    """One run. ``preset`` fills what the file leaves out.

    Attributes:
        name: folder of the run under ``output``.
        threads: CPU threads of every process; part of the bits of the result.
    """

    name: str = "agssd"
    preset: Literal["tiny", "small", "base"] = "small"
    seed: int = 0
    threads: int = 1
    output: str = "runs"
    data: DataConfig = DataConfig()
    agssd: AgssdConfig = AgssdConfig()
    training: TrainingConfig = TrainingConfig()
    monitor: MonitorConfig = MonitorConfig()
    tracking: TrackingConfig = TrackingConfig()
    federation: FederationConfig = FederationConfig()
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        sites = len(self.data.sites) or len(self.simulation.phantoms)
        require(
            [
                ""
                if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name)
                else f"name = {self.name!r} may hold letters, digits, '.', '-' and '_'.",
                within("threads", self.threads, 1, 1024),
                within("seed", self.seed, 0, 2**31 - 1),
                ""
                if sites == 0 or sites >= self.federation.min_sites
                else f"federation.min_sites = {self.federation.min_sites} can never be reached "
                f"by {sites} sites. Lower it or add sites.",
            ]
        )
        return self
