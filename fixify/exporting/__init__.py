"""Export a model with a fixed head to files that run without fixify: ONNX, torch.export, stock timm, NumPy.

`parts` splits a head into small constants, and the modules of the formats build on these.
"""
