"""Sphinx configuration."""

from pathlib import Path

project = "dask-bridges"
author = "the dask-bridges developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}
autodoc_typehints = "none"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` has executed them

# Sphinx reads what lies below this folder only, and links go from there.
copies = Path(__file__).with_name("notebooks")
copies.mkdir(exist_ok=True)
for notebook in Path(__file__).parents[1].glob("notebooks/*.ipynb"):
    copies.joinpath(notebook.name).write_text(notebook.read_text().replace("](../docs/", "](../"))
