"""What `agssd-sim compare` compares, on which scans, and how the encoders are judged."""

import re
from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.node import Node, require, within
from agssd_core.config.tasks import TaskConfig

Arm = Literal["federated", "pooled", "alone", "random", "start"]
Method = Literal["knn", "linear", "pixel", "finetune"]


class CompareDataConfig(Node):
    """Where labelled scans come from and how they are given to sites.

    Attributes:
        dataset: a data set as `agssd-sim datasets` names it; empty invents the hospitals of
            ``simulation.phantoms``.
        root: folder of the download.
        only: of the data set ``manifest``: patterns of the paths that count, such as ``3d/sts/*``.
        by: as `agssd-sim split --by`.
        sites: as `agssd-sim split --sites`; 0 takes what ``by`` gives.
        folds: patients are held out by folds, a fold for each seed in turn.
        pretrain_only: names of sites that pre-train but whose scans answer no task.
    """

    dataset: str = ""
    root: str = ""
    only: tuple[str, ...] = ()
    by: str = "site"
    sites: int = 0
    folds: int = 3
    pretrain_only: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("compare.data.folds", self.folds, 2, 100),
                within("compare.data.sites", self.sites, 0, 10000),
                "compare.data.root is missing. Name the folder of the download."
                if self.dataset and not self.root
                else "",
            ]
        )
        return self


class CompareConfig(Node):
    """A comparison under one budget of optimiser steps.

    Attributes:
        seeds: each draws its own weights, crops and held-out patients.
        arms: ``federated``; ``pooled``, all data in one place, its batch the sum of the sites'
            batches; ``alone``, each site by itself; ``random``, the same network untrained;
            ``start``, the checkpoint of ``init.checkpoint`` as it is. With such a checkpoint the
            first three go on from it.
        variants: of ``--ablate``; empty is all of them.
        tasks: what the frozen teachers are asked.
        fractions: shares of the labelled training patients that fine-tuning gets; empty does not
            fine-tune.
        finetune: how.
        margin: a task on which no trained arm leads position, intensity and the untrained network
            by more than this is marked "not informative".
        workers: cells computed side by side.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[Arm, ...] = ("federated", "pooled", "alone", "random")
    variants: tuple[str, ...] = ()
    data: CompareDataConfig = CompareDataConfig()
    tasks: tuple[TaskConfig, ...] = ()
    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25, 1.0)
    finetune: FinetuneConfig = FinetuneConfig()
    margin: float = 0.03
    workers: int = 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [task.name for task in self.tasks]
        found = [
            within("compare.margin", self.margin, 0, 1),
            within("compare.workers", self.workers, 1, 256),
            *(within("compare.seeds", seed, 0, 2**31 - 1) for seed in self.seeds),
            *(within("compare.fractions", share, 0.0001, 1) for share in self.fractions),
        ]
        for what, given in (
            ("seeds", self.seeds),
            ("arms", self.arms),
            ("variants", self.variants),
            ("tasks", names),
        ):
            if len(set(given)) < len(given):
                found.append(f"compare.{what} names one twice. Name each once.")
        if not self.seeds or not self.arms:
            found.append("compare.seeds or compare.arms is empty. Name at least one.")
        found += [f"task name {name!r} is too long." for name in names if len(name) > 40]
        found += [
            f"task name {name!r} may hold letters, digits, - and _."
            for name in names
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
        ]
        require(found)
        return self
