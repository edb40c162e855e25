"""Training from a config into a folder, as the command does it: alone, or as one of several processes."""

from pathlib import Path

from grpo_kit.config import Config
from grpo_kit.experiment import load_experiment
from grpo_kit.runs.folder import RunFolder
from grpo_kit.training.launch import joined
from grpo_kit.training.loop import train


def start(config: Config, folder: Path) -> bool:
    """Load an experiment and train its policy, together with the processes that this one was launched with.

    Returns:
        Whether this process is the first of them, which reports.

    Raises:
        KitError: one line on why it cannot be trained.
    """
    with joined(config, folder) as processes:
        if processes.is_main:
            print(f"run folder: {folder}", flush=True)
            RunFolder(folder).require_free()  # before the models are loaded
        train(load_experiment(config), folder, processes=processes)
    return processes.is_main
