"""`grpo-kit draw` and `grpo-kit course`: options and a call for each command; the work is where it belongs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="For teachers: editions of the notebooks, and the progress of a class.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where it goes; what differs there stays.")]


@app.command()
def student(folder: Folder) -> None:
    """The learners' notebooks: stubs in place of solutions."""
    from grpo_kit.course.editions import write_students

    print(f"{len(write_students(folder))} files in {folder}. Next: jupyter lab {folder / 'index.ipynb'}")


@app.command()
def solutions(folder: Folder) -> None:
    """The notebooks with their solutions open."""
    from grpo_kit.course.editions import write_solutions

    print(f"{len(write_solutions(folder))} files in {folder}")


@app.command()
def teacher(folder: Folder) -> None:
    """Notes: minutes, answers, misconceptions, a plan."""
    from grpo_kit.course.editions import write_teacher

    print(f"{len(write_teacher(folder))} pages in {folder}. Next: read {folder / 'workshop.md'}")


@app.command()
def slides(
    folder: Folder,
    js: Annotated[list[Path] | None, typer.Option(help="An archive that holds reveal.js, or MathJax.")] = None,
) -> None:
    """Slides that open without a network.

    reveal.js is not part of the kit. Get it once with `pip download --no-deps sphinx-revealjs` or `npm pack reveal.js`,
    and for formulas `npm pack mathjax@3`; name each file with --js.
    """
    from grpo_kit.course.editions import write_slides

    write_slides(folder, js or [])
    print(f"slides in {folder}. Next: open {folder / '00_start_here.html'}")


@app.command("class")
def class_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="progress.jsonl of each learner.")],
    html: Annotated[Path, typer.Option(help="The page.")] = Path("class.html"),
) -> None:
    """A page of a class, from its files of progress."""
    from grpo_kit.course.progress import class_page

    print(class_page(files, html.expanduser().resolve()))


@app.command()
def wheelhouse(
    folder: Folder,
    index: Annotated[str, typer.Option(help="One more index of pip, such as torch's own for CPUs.")] = "",
) -> None:
    """Download the pinned libraries, for a USB stick."""
    from grpo_kit.course.editions import write_wheelhouse

    write_wheelhouse(folder, index)
    print(f"there: pip install --no-index --find-links {folder} grpo_kit")


def draw(
    prompt: Annotated[str, typer.Argument(help='Such as "a crimson ball, at night".')],
    profile: Annotated[str, typer.Option("--profile", "--config", help="As for run.")] = "tiny",
    html: Annotated[Path, typer.Option(help="The page.")] = Path("first_group.html"),
) -> None:
    """Rewrite one prompt, draw and score each rewrite, show all on a page: the quickest look at what the kit does."""
    from grpo_kit.config import load_config
    from grpo_kit.show.first_group import write_first_group

    page = write_first_group(prompt, load_config(profile), html.expanduser().resolve())
    print(f"written: {page}", flush=True)
    if sys.stdout.isatty():
        typer.launch(page.as_uri())
