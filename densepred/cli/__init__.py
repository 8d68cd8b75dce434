"""The command line: one command per verb. Each parses, calls and prints; what it does lives elsewhere."""

# isort: off
# the help lists commands in this order
from densepred.cli import data
from densepred.cli import planning
from densepred.cli import preview
from densepred.cli import training
from densepred.cli import crossval
from densepred.cli import prediction
from densepred.cli import networks
from densepred.cli import about
from densepred.cli.base import app, main

__all__ = ["about", "app", "crossval", "data", "main", "networks", "planning", "prediction", "preview", "training"]
