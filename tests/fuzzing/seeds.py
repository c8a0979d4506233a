"""Valid files of every kind, small ones; all inputs are changed ones of these."""

from __future__ import annotations

import io
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image, features

import fixify
from fixify.data import OpenedData
from fixify.data.idx import ArrayImages
from fixify.heads import HeadSpec
from fixify.language import LanguageOptions, run_language
from fixify.metrics import Confusions, Metrics, WorstClass
from fixify.surgery import fix_classifier_
from fixify.training import EpochRecord, FinetuneOptions, OpenedInputs, RunOutput, train_model
from fixify.training.run_folder import StepRecord, write_confusions, write_logs, write_run

_RECIPES = Path(__file__).parents[2] / "recipes"
_RUN_FILES = ("run.json", "metrics.jsonl", "steps.jsonl", "confusions.json")


class Seeds:
    """Valid files.

    Args:
        folder: An empty folder to make them in.
    """

    def __init__(self, folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model("test_efficientnet", num_classes=4).state_dict()
        torch.save({"arch": "test_efficientnet", "state_dict": network}, folder / "net.pth")
        self.slim = fixify.convert(folder / "net.pth", folder / "net.fixed.safetensors").path.read_bytes()
        self.network = safetensors.torch.save(network)
        self._make_matrices(folder)
        state = OrderedDict([("module.conv.weight", torch.ones(2, 3, 1, 1)), ("module.n", torch.tensor(3))])
        self.weights = safetensors.torch.save(dict(state), metadata={"architecture": "resnet18"})
        self.tree: dict[str, Any] = {
            "state_dict": dict(state),
            "arch": "resnet18",
            "betas": [0.9, (1, 2)],
            "state_dict_ema": dict(state),
            "class_to_idx": {"a": 0, "b": 1},
            "args": {"model": "resnet18", "num_classes": 2, "img_size": 32},
            "meta": {"CLASSES": ("a", "b")},
            "mean": [0.5],
            "temperature": 2.0,
            "epoch": 3,
        }
        self.zips, self.legacy = [], []
        for tree in (self.tree, state):
            for is_zip, found in ((True, self.zips), (False, self.legacy)):
                buffer = io.BytesIO()
                torch.save(tree, buffer, _use_new_zipfile_serialization=is_zip)
                found.append(buffer.getvalue())
        self.facts = {
            "architecture": "test_efficientnet",
            "num_classes": "4",
            "label_names": ["a", "b"],
            "model_args": {"in_chans": 1},
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "crop_pct": 0.9},
            "class_to_idx": {"a": 0, "b": 1},
            "id2label": {"0": "a"},
            "global_pool": "avg",
            "args": {"gp": "max"},
        }
        self.index = {"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(state, "a.safetensors")}
        cfg = {"tag": "r160_in1k", "input_size": [3, 160, 160], "std": [0.2] * 3, "crop_pct": 0.9, "num_classes": 4}
        self.configs = (
            {
                "architecture": "test_efficientnet",
                "num_classes": 4,
                "label_names": ["a", "b"],
                "pretrained_cfg": cfg,
                "model_args": {"in_chans": 3, "drop_rate": 0.1},
            },
            {"architectures": ["ViTForImageClassification"], "id2label": {"0": "a", "1": "b"}, "image_size": 32},
        )
        self.maps = (
            ("txt", b"cat 0\ndog 1\nbird\t2\n"),
            ("txt", b"0 cat\n1: dog\n"),
            ("txt", b"cat\ndog\n"),
            ("json", b'{"0": ["n01", "cat"], "1": ["n02", "dog"]}'),
            ("json", b'["cat", "dog"]'),
            ("json", b'{"cat": 0}'),
            ("yaml", b"- cat\n- dog\n- {a: 1}\n"),
            ("yaml", b"cat: 0\ndog: 1\n? [x]\n: !!int 3\n"),
            ("yaml", b"0: a\n1: b\n"),
            ("yaml", b"a: &a [1, 2]\nb: *a\n"),
        )
        self.recipes = tuple(path.read_bytes() for path in sorted(_RECIPES.glob("*.yaml")))
        self.recipe_values = tuple(map(yaml.safe_load, self.recipes))
        self._make_runs(folder)
        self._make_state(folder)
        self._make_language(folder)
        self.images = _images()

    def _make_matrices(self, folder: Path) -> None:
        """Classifiers without a network, and a slim file of one."""
        weight = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
        arrays = (weight, weight.astype(np.float16), np.asfortranarray(weight), weight.astype(">f8"), weight[:, 0])
        self.arrays = []
        for array in arrays:
            buffer = io.BytesIO()
            np.save(buffer, array)
            self.arrays.append(buffer.getvalue())
        (folder / "bare.npy").write_bytes(self.arrays[0])
        self.bare = fixify.convert(folder / "bare.npy", folder / "bare.fixed.safetensors").path.read_bytes()
        tensors = {"head.weight": torch.from_numpy(weight), "head.bias": torch.ones(12)}
        self.matrix = safetensors.torch.save(tensors, metadata={"labels": "a"})

    def _make_runs(self, folder: Path) -> None:
        """A run with a fixed head and one with a learned one: run.json, metrics.jsonl, steps.jsonl, confusions.json."""
        self.runs = {}
        for name in ("fixed", "learned"):
            run = folder / "runs" / name
            run.mkdir(parents=True)
            _write_run(run, is_fixed=name == "fixed")
            self.runs |= {f"{name}/{file}": (run / file).read_bytes() for file in _RUN_FILES}

    def _make_state(self, folder: Path) -> None:
        """The state of a run that is done."""
        rng = np.random.default_rng(0)
        pixels, labels = rng.integers(0, 255, (8, 8, 8), dtype=np.uint8), np.arange(8) % 4
        preprocessing = {
            "input_size": (1, 8, 8),
            "mean": (0.4,),
            "std": (0.2,),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }
        opened = [
            OpenedData(ArrayImages(pixels, labels), tuple("abcd"), "memory", "noise", "noise", split)  # type: ignore[arg-type]
            for split in ("train", "val")
        ]
        self._inputs = OpenedInputs(*opened, preprocessing)  # type: ignore[arg-type]
        self._options = FinetuneOptions.create(
            epochs=1, batch_size=4, lr=0.01, no_aug=True, workers=0, device="cpu", ema_decay=0.9
        )
        self._train(folder / "trained", resume=False)
        self.state = torch.load(folder / "trained" / "state.pt", weights_only=True)
        self._trained = {path.name: path.read_bytes() for path in (folder / "trained").iterdir() if path.is_file()}

    def _train(self, folder: Path, *, resume: bool) -> None:
        model = torch.nn.Sequential(OrderedDict(body=torch.nn.Flatten(), fc=torch.nn.Linear(64, 4)))
        fix_classifier_(model, HeadSpec("hadamard", 64, 4))
        output = RunOutput(folder, save=_save, resume=resume)
        train_model(model, self._inputs, self._options, output)

    def resume(self, folder: Path) -> None:
        """Resume the run whose state is in a folder."""
        self._go_on(folder / "state", self._trained, lambda run: self._train(run, resume=True))

    def resume_language(self, folder: Path) -> None:
        """Resume the language run whose state is in a folder."""
        small, text = self._small, str(self._text)
        self._go_on(folder / "language-state", self._talked, lambda run: run_language(text, run, small, resume=True))

    def _go_on(self, folder: Path, files: dict[str, bytes], resume: Any) -> None:
        for name, content in files.items():
            if not name.startswith("state"):
                (folder / name).write_bytes(content)
        resume(folder)

    def _make_language(self, folder: Path) -> None:
        """Two language models, the folder of a run, its text and its state."""
        self._text = folder / "text"
        self._text.mkdir()
        for name in ("train", "valid", "test"):
            lines = [" ".join(f"w{(number * step) % 30}" for number in range(12)) for step in range(1, 12)]
            (self._text / f"wiki.{name}.tokens").write_text("\n".join(["<unk> <unk>", *lines]) + "\n")
        small = {"num_features": 16, "epochs": 1, "batch_size": 2, "seq_len": 7, "lr": 0.01, "device": "cpu"}
        self.languages = []
        for words in ("hadamard", "pmi"):
            self._small = LanguageOptions.create(words=words, **small)
            result = run_language(str(self._text), folder / words, self._small)
            self.languages.append(result.best_path.read_bytes())
        run = folder / "pmi"
        self.language_run = {name: (run / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
        self.language_state = torch.load(run / "state.pt", weights_only=True)
        self._talked = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        self._text_bytes = {path.name: path.read_bytes() for path in self._text.iterdir()}


def _save(model: torch.nn.Module, path: Path, record: dict[str, Any]) -> None:
    torch.save({"weights": model.state_dict()}, path)


def _write_run(folder: Path, *, is_fixed: bool) -> None:
    values = {"val_top5": 97.0, "val_ece": 2.0, "lr": 0.01, "train_loss": 1.5, "train_top1": 60.0}
    values |= {"images_per_second": 1000.0, "seconds": 10.0, "scale": 10.0 if is_fixed else None}
    history = [EpochRecord(epoch=n, step=9 * n + 9, val_top1=80.0 + n, val_loss=1.0, **values) for n in range(2)]
    before = Metrics(50.0, 80.0, 2.0, 5.0, 600, 1.0).to_dict()
    savings = dict.fromkeys(
        (
            "parameters_before",
            "parameters_after",
            "classifier_parameters",
            "removed",
            "bytes_before",
            "bytes_after",
            "classifier_bytes_before",
            "classifier_bytes_after",
        ),
        1000,
    )
    model = {
        "architecture": "timm/resnet18",
        "head": "hadamard" if is_fixed else "learned",
        "num_features": 512,
        "num_classes": 3,
        "parameters": 1000,
        "bytes": 4000,
        "classifier_parameters": 10,
        "classifier_bytes": 40,
        "savings": savings,
    }
    about = {
        "data": "noise",
        "class_names": ["a", "<b>", "c"],
        "train_images": 100,
        "val_images": 60,
        "device": "cpu",
        "command": "fixify finetune net --data noise",
        "before": before,
        "original_metrics": before,
        "model": model,
        "original": {"name": "net.pth", "sha256": "0" * 64},
        "teacher": {"name": "net.pth"},
    }
    write_run(folder, about, FinetuneOptions.create(epochs=2))
    steps = [StepRecord(step, step / 9, 1.0, 0.05, 10.0 if is_fixed else None) for step in (1, 2, 4, 8)]
    write_logs(folder, history, steps)
    write_confusions(folder, 18, Confusions((20, 20, 20), (20, 10, 3), (WorstClass(2, ((0, 17),)),)))


def _images() -> tuple[bytes, ...]:
    """Small images of every format that has an encoder here, in several modes and with several frames."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("PNG", "RGB", {}),
        ("PNG", "P", {"transparency": b"\x00\x80\xff"}),
        ("PNG", "I;16", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("JPEG", "RGB", {"exif": _rotated()}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("GIF", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": [noise.convert("P")] * 2}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("BMP", "1", {}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
        ("PPM", "1", {}),
        ("PPM", "I;16", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "F", {}),
        ("TIFF", "I;16", {}),
        ("TIFF", "LAB", {}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"save_all": True, "append_images": [noise] * 2, "compression": "tiff_deflate"}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [noise]}),
        ("AVIF", "RGB", {}),
        ("AVIF", "RGBA", {}),
        ("JPEG2000", "RGB", {}),
        ("ICO", "RGBA", {}),
        ("TGA", "RGB", {"compression": "tga_rle"}),
        ("PCX", "RGB", {}),
        ("SGI", "RGB", {}),
        ("DDS", "RGBA", {}),
        ("QOI", "RGB", {}),
        ("ICNS", "RGBA", {}),
    ]
    optional = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    Image.init()
    found = []
    for format, mode, options in wanted:
        needed = optional.get(format)
        if format not in Image.SAVE or (needed is not None and not features.check(needed)):
            continue
        image = noise.resize((32, 32)) if format in ("ICNS", "ICO") else noise
        buffer = io.BytesIO()
        _converted(image, mode).save(buffer, format, **options)
        found.append(buffer.getvalue())
    return tuple(found)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB") or image
    return image.convert(mode)


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def in_folder(folder: Path) -> Seeds:
    """Make the seeds in a subfolder, which is empty afterwards but for the text of the language model."""
    made = folder / "seeds"
    made.mkdir()
    seeds = Seeds(made)
    for path in made.iterdir():
        if path.name != "text":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return seeds
