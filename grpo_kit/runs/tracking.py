"""Mirrors of a run; the files in its folder stay the truth."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from grpo_kit.config import Config

logger = logging.getLogger(__name__)


class Tracker:
    """Mirrors metrics to wandb when the config says "offline" or "online"; does nothing when "disabled".

    A missing network, key or service is one warning; the run goes on.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.mode = config.tracking_settings.wandb
        self._config, self._run_dir, self._run = config, run_dir, None

    def __enter__(self) -> "Tracker":
        if self.mode != "disabled":
            self._start()
        return self

    def _start(self) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=self._config.tracking_settings.project,
                name=self._run_dir.name,
                dir=str(self._run_dir),
                mode=self.mode,
                config=self._config.to_dict(),
                settings=wandb.Settings(silent=True, console="off"),
            )
            for prefix in ("train", "eval"):
                self._run.define_metric(f"{prefix}/iteration")
                self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/iteration")
        except (wandb.Error, OSError) as error:
            logger.warning("wandb: not mirrored (%s); the run goes on, its folder has everything", error)

    def log(self, metrics: Mapping[str, float], prefix: str = "train") -> None:
        """Mirror one line, with its own "iteration", under `train/` or `eval/`."""
        if self._run is not None:
            self._run.log({f"{prefix}/{name}": value for name, value in metrics.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)
