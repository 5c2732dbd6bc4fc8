"""The command line. Results go to standard output, messages and progress to standard error.

Nothing heavy is imported before a command needs it: ``--help`` and ``check`` never import torch. Each module here
registers its commands with `app` when it is imported; their order below is the order in which ``--help`` lists them.
"""

from mergekit_lr.cli import merging, building, looking, adapters, transplanting, measuring, curvature  # noqa: I001 (the order of the commands)
from mergekit_lr.cli.app import app, main

__all__ = ["adapters", "app", "building", "curvature", "looking", "main", "measuring", "merging", "transplanting"]
