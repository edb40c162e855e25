"""What a wheel holds beside the package: the embedded world, prompts, recorded runs and notebooks, in grpo_kit/shipped.

In a checkout, and where it is installed with `pip install -e`, they are used where they lie.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("data", "notebooks", "docs/plans.json", "docs/media.json")


class BuildWithShippedFiles(build_py):
    """Copies the package's modules, and beside them what comes with the kit."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._shipped().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        shipped = [] if self.editable_mode else map(str, self._shipped().values())
        return [*super().get_outputs(include_bytecode), *shipped]

    def _shipped(self) -> dict[Path, Path]:
        """File → its place in the wheel."""
        place = Path(self.build_lib) / "grpo_kit" / "shipped"
        files = [file for name in SHIPPED for file in (Path(name), *sorted(Path(name).rglob("*"))) if file.is_file()]
        hidden = {file for file in files if any(part.startswith((".", "__")) for part in file.parts)}
        return {file: place / file for file in files if file not in hidden}


setup(cmdclass={"build_py": BuildWithShippedFiles})
