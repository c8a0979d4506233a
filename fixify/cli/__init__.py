"""The command line. `fixify.cli.app` builds it; commands import torch and timm only when they run."""

from fixify.cli.app import main

__all__ = ["main"]
