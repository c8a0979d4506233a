"""The model card and config.json: what they say, and that nothing of a file escapes its place in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

import fixify
from fixify.checkpoints.header import SlimInfo
from fixify.checkpoints.in_timm import config_for_timm
from fixify.errors import UsageError
from fixify.publishing.card import check_licence, code, model_card
from fixify.publishing.push import _base_of

EVIL = "`</code>```\n---\n# <script>alert(1)</script> ![x](http://e.vil/x.png) | [a](b) {{x}} \u202e\x1b[2J"


@pytest.fixture(scope="module")
def info(slim: Path) -> SlimInfo:
    return fixify.inspect(slim)  # type: ignore[return-value]


def changed(info: SlimInfo, **values: Any) -> SlimInfo:
    return SlimInfo.model_validate({**info.model_dump(), **values})


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


TRAINING = {
    "data": "data/birds",
    "checkpoint": "net.fixed.safetensors",
    "epochs_done": 3,
    "original_top1": 81.25,
    "before": {"top1": 70.5, "top5": 90.0, "loss": 1.25, "ece": 3.0},
    "after": {"val_top1": 80.75, "val_top5": 95.5, "val_loss": 0.75, "val_ece": 2.0},
}


def test_what_it_says(info: SlimInfo) -> None:
    source = {**info.source, "name": "timm/test_efficientnet.r160_in1k"}
    made = model_card(
        changed(info, training=TRAINING, source=source),
        "someone/birds",
        base_model="timm/test_efficientnet.r160_in1k",
        licence="apache-2.0",
    )
    assert front_matter(made) == {
        "library_name": "fixify",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "fixify", "timm"],
        "base_model": "timm/test_efficientnet.r160_in1k",
        "license": "apache-2.0",
    }
    assert "| top-1 (%) | 81.25 | 70.5 | 80.75 |" in made
    assert "| loss | - | 1.25 | 0.75 |" in made
    savings = info.savings
    assert f"| parameters | {savings['parameters_before']:,} | {savings['parameters_after']:,} |" in made
    assert "fixify.load('hf-hub:someone/birds')" in made
    assert "timm.create_model('hf-hub:someone/birds', pretrained=True)" in made
    assert "`data/birds`" in made


def test_the_programs_in_it_run(info: SlimInfo, slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fixify.push("local-dir:birds", slim)
    programs = re.findall(r"```python\n(.*?)```", Path("birds/README.md").read_text(), re.S)
    assert len(programs) == 2
    for program in programs:
        found: dict[str, Any] = {}
        exec(program, found)  # noqa: S102
        assert found["model"].get_classifier().out_features == 300


def test_without_measurements(info: SlimInfo) -> None:
    assert "fixify eval hf-hub:someone/birds" in model_card(info, "someone/birds")
    assert "license" not in front_matter(model_card(info, "someone/birds"))
    calibration = {"data": "photos", "num_images": 100, "held_out": 50, "agreement": 97.5}
    made = model_card(changed(info, calibration=calibration), "someone/birds")
    assert "97.5 %" in made and "50 images" in made
    no_labels = model_card(changed(info, training={**TRAINING, "val_labels": "teacher"}), "someone/birds")
    assert "agreement with the teacher" in no_labels


def test_nothing_of_the_file_escapes(info: SlimInfo) -> None:
    labels = [EVIL] * info.num_classes
    evil = changed(
        info,
        labels=labels,
        source={"name": EVIL, "bytes": 3},
        training={**TRAINING, "data": EVIL, "checkpoint": EVIL, "before": {"top1": EVIL, "loss": 1.0, EVIL: 2.0}},
    )
    base, licence = _base_of(evil)
    assert base is licence is None
    made = model_card(evil, "someone/birds", base_model=base, licence=licence)
    plain = model_card(info, "someone/birds")
    assert front_matter(made) == front_matter(plain)
    # What is left without code spans and blocks is what fixify wrote: no markup of the file's.
    rest = re.sub(r"(?s)```(?:python|sh)\n.*?```", "", made)
    rest = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", rest)
    for markup in ("<script", "![", "[a]", "{{", "</code>"):
        assert markup not in rest
    assert all(char.isprintable() or char == "\n" for char in made)
    assert made.count("\n---\n") == 1
    assert made.count("\n#") == plain.count("\n#")


@pytest.mark.parametrize("text", ["", " ", "`", "``a```", EVIL, "a" * 500, "\ud800", "|"])
def test_code_spans(text: str) -> None:
    made = code(text)
    fence = re.match("`+", made)[0]  # type: ignore[index]
    assert made.endswith(fence) and fence not in made[len(fence) : -len(fence)]
    assert "\n" not in made and len(made) < 2000


@pytest.mark.parametrize(
    ("name", "base", "licence"),
    [
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "apache-2.0"),
        ("timm/resnet18.no_such_tag", None, None),
        ("timm/no_such_network", None, None),
        ("torchvision/resnet50.IMAGENET1K_V2", None, None),
        ("someone/birds@v2", "someone/birds", None),
        ("../../etc/passwd", None, None),
        ("a/b\n- x", None, None),
        ("model.pth", None, None),
        ("", None, None),
    ],
)
def test_the_base_model(info: SlimInfo, name: str, base: str | None, licence: str | None) -> None:
    assert _base_of(changed(info, source={"name": name})) == (base, licence)


def test_every_licence_of_timm_is_one(info: SlimInfo) -> None:
    names = timm.list_pretrained()
    licences = {cfg.license for name in names if (cfg := timm.get_pretrained_cfg(name)) and cfg.license}
    assert len(licences) > 3
    for licence in licences:
        found = front_matter(model_card(info, "a/b", licence=check_licence(licence)))
        assert found["license"] == check_licence(licence) or found["license_name"] == check_licence(licence)
    with pytest.raises(UsageError):
        check_licence("apache: 2")


def test_config(info: SlimInfo) -> None:
    made = json.loads(json.dumps(config_for_timm(info, licence="mit")))
    assert made["architecture"] == "fixify_slim"
    assert (made["num_classes"], made["num_features"]) == (300, 256)
    assert made["label_names"][1] == "thing 1"
    assert made["pretrained_cfg"]["classifier"] == "classifier"
    assert made["pretrained_cfg"]["mean"] == list(info.preprocessing["mean"])
    assert made["fixify"]["version"] == "1"
