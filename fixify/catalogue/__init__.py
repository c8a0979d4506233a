"""What fixify knows of the architectures of timm, torchvision and the paper without importing these libraries.

The index that ships with fixify lists the names and shapes of each architecture, its classifier layers and its
preprocessing. What it does not know is built and looked up by `fixify.models`.
"""
