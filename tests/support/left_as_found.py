"""A user's process with settings of its own, in which the kit trains, evaluates and reports; prints what it changed."""

import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import wandb

SETTINGS = {
    "model_settings.device": "cpu",
    "training_settings.num_iterations": 2,
    "training_settings.prompts_per_iteration": 2,
    "training_settings.group_size": 4,
    "generation_settings.num_inference_steps": 2,
    "evaluation_settings.validation_prompts": 3,
    "evaluation_settings.num_prompts": 3,
    "evaluation_settings.seeds_per_prompt": 1,
    "tracking_settings.wandb": "offline",
    "tracking_settings.tensorboard": True,
    "tracking_settings.log_level": "DEBUG",
}


def of_one_owner(folder: Path) -> "wandb.Run":
    """What a user may have set: a run on wandb, log handlers, verbosity, threads, styles, filters, signals."""
    mine = wandb.init(mode="offline", project="mine", dir=str(folder / "mine"), settings=wandb.Settings(silent=True))
    logging.getLogger().addHandler(logging.FileHandler(folder / "mine.log"))
    logging.getLogger("grpo_kit").setLevel("ERROR")
    logging.getLogger("grpo_kit").propagate = False
    logging.captureWarnings(True)
    warnings.filterwarnings("error", "a warning of mine")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.ion()
    plt.rcParams["font.size"] = 31
    plt.figure(7)
    pd.set_option("display.max_rows", 7)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    np.seterr(divide="ignore")
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.path.insert(0, str(folder / "code of mine"))
    return mine


def louder() -> None:
    """What a user may have set of the model libraries, once they are there."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_info()
    diffusers.utils.logging.set_verbosity_debug()


def found() -> dict[str, str]:
    """Everything that two users of one process would both call theirs."""
    import diffusers
    import huggingface_hub
    import matplotlib.pyplot as plt
    import transformers

    logs = {name: logging.getLogger(name) for name in ("", "grpo_kit", "matplotlib", "transformers", "diffusers")}
    numbers = [number for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]
    return {
        name: repr(value)
        for name, value in {
            "loggers": {name: (log.level, log.handlers, log.propagate, log.filters) for name, log in logs.items()},
            "logging": (logging.captureWarnings.__module__, logging.root.manager.disable, warnings.showwarning),
            "warning filters": [repr(one) for one in warnings.filters],
            "matplotlib": dict(matplotlib.rcParams),
            "pyplot": (matplotlib.get_backend(), plt.isinteractive(), plt.get_fignums()),
            "pandas": {name: pd.get_option(name) for name in ("display.max_rows", "display.width")},
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "dtype": (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
            "torch": (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
            "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
            "random": random.getstate(),
            "numpy": (np.random.get_state(), np.geterr(), np.get_printoptions()),
            "torch random": torch.get_rng_state().tolist(),
            "transformers": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
            "diffusers": (diffusers.utils.logging.get_verbosity(), diffusers.utils.logging.is_progress_bar_enabled()),
            "hub": huggingface_hub.utils.are_progress_bars_disabled(),
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "sys.path": sys.path,
            "hooks": (sys.excepthook, sys.exit, sys.displayhook, threading.excepthook, sys.stdout, sys.stderr),
            "signals": {number: signal.getsignal(number) for number in numbers},
            "recursion": sys.getrecursionlimit(),
            "wandb": (wandb.run, wandb.setup().settings.silent),
        }.items()
    }


def main(folder: Path) -> None:
    """Train, evaluate, draw and report between two looks, and go on with the user's own run."""
    import grpo_kit as gk

    mine = of_one_owner(folder)
    kit = gk.load_experiment(gk.load_config("tiny", SETTINGS))
    louder()
    before, filters = found(), [repr(one) for one in warnings.filters]
    gk.load_experiment(kit.config)
    seen = []
    gk.train(kit, folder / "run", progress=False, on_iteration=lambda metrics: seen.append(wandb.run is mine))
    gk.evaluate(kit, run_dir=folder / "run")
    gk.collect_rollout(kit.policy, kit.generator, kit.rewards, kit.train_prompts[:2], 2, seed=0)._repr_html_()
    from grpo_kit.show import loop_figure, write_report

    write_report(folder / "run")
    loop_figure().to_png()
    after = found()
    kept = [repr(one) for one in warnings.filters]  # a library may add one for its own warnings when it is imported
    after["warning filters"] = repr([one for one in kept if one in filters])
    changed = {name: (before[name][:300], after[name][:300]) for name in before if before[name] != after[name]}
    mine.log({"after": 1.0})
    mine.finish()
    print("FOUND " + json.dumps({"changed": changed, "during": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
