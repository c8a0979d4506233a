"""fixify: the classifier of a pretrained model should cost nothing."""

__version__ = "0.1.0"
