"""Optional copies of the metrics: TensorBoard event files and an MLflow file store.

``metrics.jsonl`` stays the record; these are views of it for people who have such tools open.
Neither copy leaves the machine. The packages are the optional extra ``tracking``.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from agssd_core.config import TrackingConfig
from agssd_core.errors import ConfigError


class _Copy(Protocol):
    """One place that metrics are copied to."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def flush(self) -> None: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Copies each row of metrics to every place that the configuration names; may name none."""

    def __init__(self, copies: tuple[_Copy, ...]) -> None:
        self._copies = copies

    def log(self, metrics: Mapping[str, float], step: int, *, prefix: str = "") -> None:
        """Write one row; ``prefix`` is, say, a site's name and stands before each metric's."""
        row = {f"{prefix}/{name}" if prefix else name: value for name, value in metrics.items()}
        for copy in self._copies:
            copy.log(row, step)

    def flush(self) -> None:
        """Bring what was logged to disk."""
        for copy in self._copies:
            copy.flush()

    def clear(self) -> None:
        """Forget everything that was logged, now or by an earlier process."""
        for copy in self._copies:
            copy.clear()

    def close(self) -> None:
        """Flush everything to disk and end the copies."""
        for copy in self._copies:
            copy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_tracker(config: TrackingConfig, folder: Path, *, run: str) -> Tracker:
    """Open the copies named by the configuration under ``folder``.

    Args:
        config: which copies to keep.
        folder: the run's folder; gets ``tensorboard/`` and ``mlruns/``.
        run: name of the run in MLflow; a resumed run continues under the same name.

    Raises:
        ConfigError: a named package is not installed.
    """
    copies: list[_Copy] = []
    if config.tensorboard:
        copies.append(_TensorBoard(folder / "tensorboard"))
    if config.mlflow:
        copies.append(_Mlflow(folder / "mlruns", run))
    return Tracker(tuple(copies))


def require_packages(config: TrackingConfig) -> None:
    """Fail now, not after hours, when a copy is asked for that cannot be written.

    Raises:
        ConfigError: a named package is not installed.
    """
    if config.tensorboard:
        _writer_class()
    if config.mlflow:
        _client_class()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = _writer_class()(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def clear(self) -> None:
        self._writer.close()
        shutil.rmtree(self._folder)
        self._writer = _writer_class()(str(self._folder))

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, folder: Path, run: str) -> None:
        client_class = _client_class()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name = folder, run
        self._client: Any = client_class(tracking_uri=folder.resolve().as_uri())
        experiment = self._client.get_experiment_by_name("agssd")
        known = experiment.experiment_id if experiment else None
        self._experiment = known or self._client.create_experiment("agssd")
        self._run = self._open_run(run)

    def _open_run(self, name: str) -> str:
        found = self._client.search_runs([self._experiment], f"tags.mlflow.runName = '{name}'")
        if found:
            return str(found[0].info.run_id)
        return str(self._client.create_run(self._experiment, run_name=name).info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            allowed = re.sub(r"[^\w\-. /]", "_", name)
            self._client.log_metric(self._run, allowed, value, step=step)

    def flush(self) -> None:
        """Every point is written at once."""

    def clear(self) -> None:
        # MLflow itself would only mark the run as deleted, and keep its points.
        shutil.rmtree(self._folder / self._experiment / self._run)
        self._run = self._open_run(self._name)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    return SummaryWriter


def _client_class() -> Any:
    # MLflow 3 refuses a plain folder unless told that it is wanted.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise _missing("mlflow") from None
    return MlflowClient


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"tracking.{package} is on, but the package is not installed. Run "
        "pip install 'agssd-federation[tracking]', or turn it off."
    )
