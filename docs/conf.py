"""Sphinx configuration."""

project = "dask-bridges"
author = "the dask-bridges developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}
autodoc_typehints = "none"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
