"""A notebook's page shows its formulas and folded hints without a script."""

from pathlib import Path

import nbformat
import pytest
from support.hostile import active_nodes

from grpo_kit.show.pages import write_notebook_pages


def page_of(source: str, folder: Path) -> str:
    """The page of a notebook with one cell of prose."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    nbformat.write(notebook, folder / "one.ipynb")
    return write_notebook_pages(folder)[0].file.read_text(encoding="utf-8")


def test_formulas_are_mathml(tmp_path: Path):
    page = page_of(
        r"With $\theta$:" + "\n\n" + r"$$ \nabla J = \sum_y r(y)\, \nabla \pi_\theta(y) \tag{1} $$", tmp_path
    )
    assert page.count("<math ") == 2 and 'display="block"' in page
    assert "\\" not in page.partition("<main")[2] and "$" not in page.partition("<main")[2]


@pytest.mark.parametrize("formula", [r"\frac{", "x^", r"\left( x", "a^b^c"])
def test_a_formula_that_cannot_be_read_is_shown_as_written(formula: str, tmp_path: Path):
    assert f"${formula}$" in page_of(f"Here: ${formula}$.", tmp_path)


@pytest.mark.parametrize(
    "formula", [r"\text{<img src=x onerror=alert(1)>}", r"\href{javascript:alert(1)}{x}", "<script>alert(1)</script>"]
)
def test_a_formula_runs_nothing(formula: str, tmp_path: Path):
    page = page_of(f"Here: ${formula}$, and\n\n$$ {formula} $$\n\n<div>${formula}$</div>", tmp_path)
    assert "<math" in page and active_nodes(page) == [] and "src=" not in page and 'href="java' not in page


def test_formulas_in_html_are_not_taken_over(tmp_path: Path):
    assert active_nodes(page_of("<math><mtext><img src=x onerror=alert(1)></mtext></math>", tmp_path)) == []


@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_a_hint_stays_folded_whether_it_has_paragraphs_or_not(blank: str, tmp_path: Path):
    page = page_of(f"Do it.\n\n<details><summary>Hint 1</summary>{blank}It is $x$.{blank}</details>\n\nMore.", tmp_path)
    hint = page.partition("<details>")[2].partition("</details>")[0]
    assert "It is" in hint and "<math" in hint and "More" not in hint


def test_code_is_no_formula(tmp_path: Path):
    page = page_of("And `$x$` is code.", tmp_path)
    assert "<math" not in page and "<code>$x$</code>" in page
