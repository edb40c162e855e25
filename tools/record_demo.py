"""Record `data/demo_run` again: one run of profile tiny, from which notebooks, widgets and tests read.

It is trained and evaluated like any run, then put in place without its checkpoints, and with evaluation pictures of
every fifth prompt only, to keep the repository small. `python -m tools.record_demo` takes four minutes on two cores.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import grpo_kit as gk
from grpo_kit.config import PROJECT_ROOT

COMPARE = ("raw", "initial", "trained", "oracle")
LEFT_OUT = ("checkpoints", ".lock", ".writing-*")
PICTURED = 5  # every fifth prompt keeps a picture of each variant, from its first latent


def main(
    out: Annotated[Path, typer.Option(help="what is replaced")] = PROJECT_ROOT / "data" / "demo_run",
    profile: Annotated[str, typer.Option(help="a profile of the embedded world")] = "tiny",
) -> None:
    """Train, evaluate, trim, put in place."""
    config = gk.load_config(profile)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / out.name
        gk.train(gk.load_experiment(config), run)
        gk.evaluate(gk.load_experiment(config, trained=run / "best"), compare=COMPARE, run_dir=run)
        trim_pictures(run)
        halve_weights(run / "best" / "model.safetensors")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run, out, ignore=shutil.ignore_patterns(*LEFT_OUT))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    typer.echo(f"recorded: {out} ({size / 1e6:.1f} MB)")


def halve_weights(place: Path) -> None:
    """Store weights in half precision, half as large; they are loaded as the profile says, in float32."""
    with safe_open(place, "pt") as file:
        told = file.metadata()
    save_file({name: value.half() for name, value in load_file(place).items()}, place, metadata=told)


def trim_pictures(run: Path) -> None:
    """Drop the evaluation's pictures but those of every fifth prompt's first latent; its table says which are left."""
    place = run / "evaluation" / "rows.parquet"
    rows = pd.read_parquet(place)
    dropped = (rows["seed"] > 0) | (rows["prompt_id"] % PICTURED > 0)
    for name in rows.loc[dropped, "thumbnail"].dropna():
        (run / name).unlink()
    rows.assign(thumbnail=rows["thumbnail"].mask(dropped, None)).to_parquet(place, index=False)


if __name__ == "__main__":
    typer.run(main)
