"""Be the reward: order the images of a group by clicking, and your ranking is what the next step learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ipywidgets
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.show.images import image_grid
from grpo_kit.show.style import Drawing, plain_text, styled
from grpo_kit.show.widgets.layout import side_by_side
from grpo_kit.show.widgets.markup import escape, heading, message, picture, sheet
from grpo_kit.show.widgets.twin import TwinBox

SIDE = 180  # pixels of a picture
COLUMN = 222  # pixels of a card and the gap behind it


class BeTheReward(TwinBox):
    """The images of a group, each with a button: click the best first, then the next best, down to the worst.

    A second click on a button takes its image out of the order again. `rewards` is 1 for the best image, 0 for the
    worst, and evenly spaced between.

    Args:
        images: one a sample; None where a sample has none.
        texts: each sample's rewrite.
        prompt: what the user asked for.
        default: one reward a sample, which count until every image is ranked: so that a run in which nobody clicks can
            go on. Without it `rewards` is an error until then, since nobody's opinion is not a reward.

    Raises:
        KitError: there are fewer than two images, or other than one text (and default) each.
    """

    def __init__(
        self,
        images: Sequence[Image.Image | None],
        texts: Sequence[str],
        prompt: str,
        default: Sequence[float] | None = None,
    ) -> None:
        self._images, self._texts, self._prompt = list(images), [str(text) for text in texts], str(prompt)
        self._default = None if default is None else [float(value) for value in default]
        self._check()
        self.order: list[int] = []  # of the samples, best first
        self.buttons = [self._button(number) for number in range(len(self._images))]
        self.reset_button = ipywidgets.Button(description="start again", layout=ipywidgets.Layout(width="120px"))
        self.reset_button.on_click(lambda _: self.reset())
        title = ipywidgets.HTML(sheet(heading(f"“{self._prompt}”", "Which image shows it best? Click that one first.")))
        cards = [self._card(number) for number in range(len(self._images))]
        self._line = ipywidgets.HTML(layout=ipywidgets.Layout(min_height="46px"))
        columns = 4 if len(cards) % 4 == 0 else 5
        super().__init__([title, side_by_side(cards, max_width=f"{COLUMN * columns}px"), self.reset_button, self._line])
        self._draw()

    def _check(self) -> None:
        count = len(self._images)
        if count < 2 or len(self._texts) != count:
            found = f"{count} images and {len(self._texts)} texts"
            raise KitError(f"BeTheReward: found {found}, allowed: at least 2 images and a text each. Pass one group.")
        if self._default is not None and len(self._default) != count:
            raise KitError(f"default: found {len(self._default)} rewards, allowed: {count}. Pass one an image.")
        if self._default is not None and not all(math.isfinite(value) for value in self._default):
            raise KitError("default: found a reward that is not finite, allowed: numbers. Leave that sample out.")

    def _button(self, number: int) -> ipywidgets.Button:
        button = ipywidgets.Button(layout=ipywidgets.Layout(width=f"{SIDE}px", margin="2px 8px"))
        button.on_click(lambda _: self._click(number))
        return button

    def _card(self, number: int) -> ipywidgets.VBox:
        image = picture(self._images[number], self._texts[number], SIDE)
        box = f"height:62px;width:{SIDE}px;overflow-y:auto;font-size:13px"
        page = ipywidgets.HTML(sheet(f'{image}<div style="{box}">{escape(self._texts[number])}</div>'))
        return ipywidgets.VBox([page, self.buttons[number]], layout=ipywidgets.Layout(width=f"{COLUMN - 16}px"))

    def _click(self, number: int) -> None:
        if number in self.order:
            self.order.remove(number)
        else:
            self.order.append(number)
        self._draw()

    def reset(self) -> None:
        """Forget the order."""
        self.order.clear()
        self._draw()

    def _draw(self) -> None:
        for number, button in enumerate(self.buttons):
            ranked = number in self.order
            button.description = _place(self.order.index(number), len(self.buttons)) if ranked else "choose"
            button.button_style = "primary" if ranked else ""
        self._line.value = message(self._reading())

    @property
    def ranked(self) -> bool:
        """Whether every image has its place."""
        return len(self.order) == len(self._images)

    @property
    def rewards(self) -> list[float]:
        """One reward a sample, in the given order: 1 for the best image, 0 for the worst, evenly spaced between.

        Raises:
            KitError: not every image is ranked, and there is no `default`.
        """
        if self.ranked:
            last = len(self.order) - 1
            return [1 - self.order.index(number) / last for number in range(len(self.order))]
        if self._default is not None:
            return list(self._default)
        found = f"{len(self.order)} of {len(self._images)} images ranked"
        raise KitError(f"rewards: found {found}, allowed: all. Click the others, or pass default= to go on without.")

    def _reading(self) -> str:
        """Say how far the ranking is."""
        if self.ranked:
            return f"All {len(self.order)} are ranked. Rewards: {', '.join(f'{r:.2f}' for r in self.rewards)}."
        rest = " Until then the default rewards count." if self._default is not None else ""
        return f"{len(self.order)} of {len(self._images)} are ranked. Click the best of those that are left.{rest}"

    @styled
    def figures(self) -> list[Drawing]:
        """Return the images with their places, or numbered as given while the ranking is not complete."""
        last = len(self._images)
        names = [_place(self.order.index(i), last) if self.ranked else f"{i + 1}" for i in range(last)]
        captions = [f"{name}\n{plain_text(text, 90)}" for name, text in zip(names, self._texts, strict=True)]
        figure = image_grid(
            [image or _empty() for image in self._images], captions, 4 if last % 4 == 0 else 6, size=1.9
        )
        how = "as ranked by clicking" if self.ranked else "not ranked yet: run the notebook, and click the best first"
        figure.set_figheight(figure.get_figheight() + 0.45)  # two lines above the pictures
        figure.suptitle(f"“{plain_text(self._prompt, 60)}”\n{how}", x=0.01, ha="left", weight="bold", fontsize=10.5)
        return [figure]

    def summary(self) -> str:
        """Return the prompt and how far the ranking is."""
        return f"Be the reward: “{self._prompt}”. {self._reading()}"


def _place(rank: int, count: int) -> str:
    """Return a place as the buttons show it: `1 (best)`, `2`, …, `8 (worst)`."""
    return f"{rank + 1}" + (" (best)" if rank == 0 else " (worst)" if rank == count - 1 else "")


def _empty() -> Image.Image:
    return Image.new("RGB", (64, 64), "white")
