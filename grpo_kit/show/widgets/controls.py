"""The controls of the widgets, each with the width and the label that it has everywhere."""

from collections.abc import Callable, Iterable, Sequence

import ipywidgets

WHOLE_LABEL = {"description_width": "initial"}  # as wide as its text


def row(children: Iterable[ipywidgets.Widget]) -> ipywidgets.HBox:
    """Return widgets in a row, with room between them, that goes on in the next line where the page is narrow."""
    return ipywidgets.HBox(list(children), layout=dict(flex_flow="row wrap", grid_gap="4px 14px"))


def button(text: str, action: Callable[[], object], width: str = "auto") -> ipywidgets.Button:
    """Return a button that calls `action`."""
    made = ipywidgets.Button(description=text, layout=dict(width=width, margin="2px 1%"))
    made.on_click(lambda _: action())
    return made


def dropdown(name: str, options: Sequence, value: object, pixels: int) -> ipywidgets.Dropdown:
    """Return a list to choose from."""
    return ipywidgets.Dropdown(
        options=options, value=value, description=name, style=WHOLE_LABEL, layout=dict(width=f"{pixels}px")
    )


def slider(name: str, value: float, low: float, high: float, **settings: object) -> ipywidgets.FloatSlider:
    """Return a slider in steps of 0.01; `settings` are those of ipywidgets."""
    usual = dict(step=0.01, style=WHOLE_LABEL, layout=dict(width="300px"))
    return ipywidgets.FloatSlider(value=value, min=low, max=high, description=name, **usual | settings)


def on_change(controls: Iterable[ipywidgets.Widget], action: Callable[[], object]) -> None:
    """Call `action` whenever the value of one of the controls changes."""
    for control in controls:
        control.observe(lambda _: action(), names="value")
