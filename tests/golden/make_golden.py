"""Makes the golden slim checkpoint of a format version. Run once a version; what is committed is never made again.

python tests/golden/make_golden.py tests/golden/v1
python tests/golden/make_golden.py tests/golden/v1-binary
python tests/golden/make_golden.py tests/golden/v1-ternary
python tests/golden/make_golden.py tests/golden/v1-levels
"""

import json
import sys
import tempfile
from pathlib import Path

import timm
import torch

import fixify

RATES = {
    "v1-binary": {"bits_per_class": 44},
    "v1-ternary": {"bits_per_weight": 1.58},
    "v1-levels": {"bits_per_weight": 3},
}


def main() -> None:
    stem = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=100, in_chans=1)
    options = {}
    if stem.name != "v1":
        options = {"head": "binary", **RATES[stem.name]}
        model.classifier.weight.data.mul_(2000)  # its logits are the old ones', which are near 0 untrained
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "golden.pth"
        torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, source)
        out = stem.with_name(stem.name + ".fixed.safetensors")
        path = fixify.convert(source, out, dtype="float16", **options).path
    with torch.inference_mode():
        logits = fixify.load(path)(golden_images())
    stem.with_name(stem.name + ".json").write_text(json.dumps({"logits": logits[:, :8].tolist()}, indent=1) + "\n")


def golden_images() -> torch.Tensor:
    """Two images that need no random numbers, [2, 1, 32, 32]."""
    return torch.arange(2 * 32 * 32).reshape(2, 1, 32, 32).mul(0.37).sin()


if __name__ == "__main__":
    main()
