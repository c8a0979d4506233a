"""Makes the golden slim checkpoint of a format version. Run once a version; what is committed is never made again.

python tests/golden/make_golden.py tests/golden/v1
python tests/golden/make_golden.py tests/golden/v1-binary
python tests/golden/make_golden.py tests/golden/v1-ternary
python tests/golden/make_golden.py tests/golden/v1-levels
python tests/golden/make_golden.py tests/golden/v1-projected
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
        options = {"head": "binary", **RATES.get(stem.name, {})}
        model.classifier.weight.data.mul_(2000)  # its logits are the old ones', which are near 0 untrained
    if stem.name == "v1-projected":
        logits_of(projected(model, stem), stem)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "golden.pth"
        torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, source)
        out = stem.with_name(stem.name + ".fixed.safetensors")
        path = fixify.convert(source, out, dtype="float16", **options).path
    logits_of(path, stem)


def logits_of(path: Path, stem: Path) -> None:
    """Write the first logits of a slim checkpoint."""
    with torch.inference_mode():
        logits = fixify.load(path)(golden_images())
    stem.with_name(stem.name + ".json").write_text(json.dumps({"logits": logits[:, :8].tolist()}, indent=1) + "\n")


def projected(model: torch.nn.Module, stem: Path) -> Path:
    """Write a slim checkpoint of 45 signs in 20 projected coordinates; its planes are no whole bytes."""
    images = torch.arange(64 * 32 * 32).reshape(64, 1, 32, 32).mul(0.61).sin()
    with torch.inference_mode():
        features = model.eval().forward_head(model.forward_features(images), pre_logits=True).clone()
    spec = fixify.HeadSpec(
        "binary", 256, 100, bits_per_class=45, planes=(20, 15, 7, 3), gains=True, normalize=False, standardize="center"
    )
    fixify.fix_classifier_(model, spec, features={"classifier": features})
    for name, child in model.named_children():
        if name != "classifier":
            child.half()
    return fixify.save(model, stem.with_name(stem.name + ".fixed.safetensors"))


def golden_images() -> torch.Tensor:
    """Two images that need no random numbers, [2, 1, 32, 32]."""
    return torch.arange(2 * 32 * 32).reshape(2, 1, 32, 32).mul(0.37).sin()


if __name__ == "__main__":
    main()
