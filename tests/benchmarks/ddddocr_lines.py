"""Draw lines of Chinese text and run the reader of `ddddocr` on them, a real network with many classes.

    apt-get install --no-install-recommends fonts-noto-cjk fonts-noto-cjk-extra fonts-arphic-uming fonts-arphic-ukai \
        fonts-wqy-microhei fonts-wqy-zenhei fonts-lxgw-wenkai fonts-hanazono
    pip install --no-deps ddddocr==1.6.1 && pip install onnx onnxruntime

The network reads a line of text, 64 pixels high, in steps; its classifier tells 8,210 classes apart by N = 1,024
features per step (a bidirectional LSTM). The data are lines of random characters. Steps of lines in some typefaces
calibrate without labels; other text in other typefaces is what agreement is measured on. Class 0 is "nothing here",
the answer of most steps, so steps with a character are counted on their own. tests/benchmarks/dial.py measures.
"""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = Path("/usr/share/fonts")
_NOTO = "opentype/noto/Noto"
CALIBRATION_FACES = (
    *(f"{_NOTO}SansCJK-{weight}.ttc" for weight in ("Black", "Bold", "Regular", "Light", "Thin")),
    *(f"{_NOTO}SerifCJK-{weight}.ttc" for weight in ("Black", "Bold", "Medium", "ExtraLight")),
    "truetype/wqy/wqy-microhei.ttc",
    "truetype/arphic/uming.ttc",
)
OTHER_FACES = (
    "truetype/arphic/ukai.ttc",
    "truetype/wqy/wqy-zenhei.ttc",
    "truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf",
    "truetype/hanazono/HanaMinA.ttf",
)
LINES, SAMPLES = 400, 4096
"""Lines that are drawn to calibrate, half as many others, and the steps that do calibrate."""
_HEIGHT, _CHARACTERS, _SIZE = 64, 8, 46


def package() -> Path:
    """Return the folder of the installed package."""
    found = find_spec("ddddocr")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps ddddocr==1.6.1")
    return Path(found.origin).parent


def characters() -> list[str]:
    """List the Chinese characters that the network knows."""
    known = runpy.run_path(str(package() / "charsets.py"))["CHARSET_BETA"]  # importing the package needs OpenCV
    return [one for one in known if len(one) == 1 and "\u4e00" <= one <= "\u9fff"]


def line(face: Path, text: str, draw: np.random.Generator) -> np.ndarray:
    """Draw a line in dark on light, with a little noise: float32 [64, width] between 0 and 1."""
    font = ImageFont.truetype(str(face), _SIZE, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (round(font.getlength(text)) + 16, _HEIGHT), int(draw.integers(215, 256)))
    ink = int(draw.integers(0, 90))
    ImageDraw.Draw(image).text((8, _HEIGHT // 2 + int(draw.integers(-3, 4))), text, fill=ink, font=font, anchor="lm")
    pixels = np.asarray(image, dtype=np.float32) + draw.normal(0, draw.uniform(0, 10), (_HEIGHT, image.width))
    return (pixels.clip(0, 255) / 255).astype(np.float32)


def network() -> tuple[object, Tensor, Tensor]:
    """Return a session that maps a line to the classifier's input [steps, N], its weight [C, N] and its bias [C]."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    model = onnx.load(str(package() / "common.onnx"))
    gemm = [node for node in model.graph.node if node.op_type == "Gemm"][-1]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weight, bias = (torch.from_numpy(numpy_helper.to_array(stored[name]).copy()) for name in gemm.input[1:])
    model.graph.output.append(onnx.helper.make_tensor_value_info(gemm.input[0], onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options), weight, bias


def steps(session: object, faces: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Run the network on lines in each of some typefaces: the classifier's inputs, float32 [steps, N], shuffled."""
    draw, known = np.random.default_rng(seed), characters()
    name = session.get_outputs()[-1].name
    seen = []
    for number in range(count):
        face = FONTS / faces[number % len(faces)]
        text = "".join(draw.choice(known, _CHARACTERS))
        seen.append(session.run([name], {"input1": line(face, text, draw)[None, None]})[0])
    found = torch.from_numpy(np.concatenate(seen))
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


def load(cache: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, bias, the calibration steps and the others; they are made once (in minutes), then read."""
    path = cache / f"ddddocr-{LINES}.pt"
    if not path.exists():
        session, weight, bias = network()
        parts = steps(session, CALIBRATION_FACES, LINES, 0), steps(session, OTHER_FACES, LINES // 2, 1)
        torch.save((weight, bias, *parts), path)
    return torch.load(path, weights_only=True)
