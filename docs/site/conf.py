"""Sphinx's configuration of the site. `python -m tools.site` gathers the pages and calls Sphinx (`make site`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "grpo_kit"
author = "the authors of grpo_kit"
html_title = "grpo_kit: GRPO on images"
language = "en"

extensions = ["myst_nb", "pages"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
suppress_warnings = [
    "myst.header",  # a README may start a section two levels deeper
    "mystnb.unknown_mime_type",
]

# notebooks are taken as they were executed
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "html_image"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_url_schemes = {"http": None, "https": None, "mailto": None, "site": "{{path}}"}  # site: a file beside the pages

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_math_renderer = "mathml"  # of extensions/pages.py: no script and no font from elsewhere
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False, "top_of_page_buttons": []}
