"""`fixify push` into a folder; tests/publishing has the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]


def test_push_then_use_the_folder(run: Run, make_stripes: Callable[[int, int], Path], tmp_path: Path) -> None:
    folder = make_stripes(4, 8)
    shutil.copy(folder / "net.fixed.safetensors", tmp_path)
    code, out, err = run("push", "local-dir:net", "--license", "Apache-2.0", "--json")  # the only one here
    assert code == 0, err
    found = json.loads(out)
    assert found["files"].keys() == {"model.safetensors", "config.json", "README.md"}
    assert (found["name"], found["license"]) == ("local-dir:net", "apache-2.0")
    image = next((folder / "data" / "val").rglob("*.png"))
    for command in (("predict", "local-dir:net", image), ("inspect", "local-dir:net"), ("verify", "net")):
        code, out, err = run(*command, "--json")
        assert code == 0, err
    code, out, err = run(
        "eval", "local-dir:net", "--data", folder / "data", "--workers", "0", "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["models"][0]["num_images"] == 8
    assert run("push", "local-dir:net")[0] == 1
    code, out, err = run("push", "local-dir:net", "net.fixed.safetensors", "--force")
    assert code == 0 and "model.safetensors" in out and "licence is not known" in err


def test_bad_usage(run: Run, tmp_path: Path) -> None:
    assert run("push", "organisation/name")[0] == 2  # no checkpoint here
    (tmp_path / "net.fixed.safetensors").touch()
    assert run("push", "name")[0] == 2
    assert run("push", "local-dir:x", "--private")[0] == 2
    assert run("push", "organisation/name", "--license", "mine: yes")[0] == 2
    assert run("push", "organisation/name")[0] == 1  # not a slim checkpoint
