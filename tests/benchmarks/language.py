"""Compare learned and fixed words on a small text, with the same budget for each (paper, section 3.3).

    apt-get install bible-kjv
    python tests/benchmarks/kjv.py kjv
    python tests/benchmarks/language.py kjv --seeds 0 1 2 --out language.jsonl
    python tests/benchmarks/language.py --table language.jsonl

Each row is the recipe kjv-lstm with another word model, at the recipe's learning rate, which was the best of three for
learned words (seed 0, validation perplexity after 2 epochs: 40.5 at 0.004, 37.0 at 0.01, 37.4 at 0.02); --lr sets
another. The results are the perplexities on validation and test text at the epoch that is best on validation. A run
that is already in --out is not repeated. word2vec needs gensim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from fixify.language import LanguageOptions, run_language
from fixify.recipes import read_recipe

_PAPER = {"head_normalize": True, "head_scale": None, "head_rank": 0}
ROWS: dict[str, dict[str, Any]] = {
    "learned": {"words": "learned"},
    "tied": {"words": "tied"},
    "random orthogonal": {"words": "orthogonal", **_PAPER},
    "word2vec": {"words": "word2vec", **_PAPER},
    "PMI": {"words": "pmi", **_PAPER},
    "PMI + rank 8": {},
    "signs of PMI + rank 8": {"head_signs": True},
    "Hadamard + rank 8": {"words": "hadamard"},
}


def options_of(row: str, **given: Any) -> LanguageOptions:
    base = read_recipe("kjv-lstm").language
    if base is None:
        raise SystemExit("The recipe kjv-lstm has no language section.")
    changed = ROWS[row]
    if changed.get("words") in ("learned", "tied"):
        base = base.with_learned_words()
    return base.replace(**changed, **given, device="cpu")


class Bench:
    """Runs the rows and adds each result to a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.known = read(arguments.out) if arguments.out.exists() else []

    def run(self, row: str, seed: int) -> dict[str, Any]:
        epochs, lr = self.arguments.epochs, self.arguments.lr
        key = (row, seed, lr, epochs)
        found = next((e for e in self.known if (e["row"], e["seed"], e["lr"], e["epochs"]) == key), None)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory() as folder:
            options = options_of(row, seed=seed, lr=lr, epochs=epochs)
            result = run_language(self.arguments.text, Path(folder) / "run", options)
        entry = {
            "row": row,
            "seed": seed,
            "lr": lr,
            "epochs": epochs,
            "val": result.val.perplexity,
            "test": result.test.perplexity,
            "by_epoch": [record.val_perplexity for record in result.history],
            "learned_parameters": result.size.learned,
            "share_fixed": result.size.share,
        }
        self.known.append(entry)
        with self.arguments.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
        return entry


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(path: Path) -> None:
    """Print means over seeds (lowest to highest); ratios to learned words are taken per seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in read(path):
        found.setdefault(entry["row"], {})[entry["seed"]] = entry
    print(f"| words | learned parameters | validation | / learned | test | seeds |\n|{'---|' * 6}")
    for row, by_seed in found.items():
        shared = [seed for seed in by_seed if seed in found["learned"]]
        ratios = [by_seed[seed]["val"] / found["learned"][seed]["val"] for seed in shared]
        runs = list(by_seed.values())
        cells = [_spread([run[name] for run in runs], 1) for name in ("val", "test")]
        size = f"{runs[0]['learned_parameters']:,}"
        print(f"| {row} | {size} | {cells[0]} | {_spread(ratios, 3)} | {cells[1]} | {len(runs)} |")


def _spread(values: list[float], digits: int) -> str:
    shown = f"{statistics.mean(values):.{digits}f}"
    return f"{shown} ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="folder of the text")
    base = read_recipe("kjv-lstm").language
    if base is None:
        raise SystemExit("The recipe kjv-lstm has no language section.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--epochs", type=int, default=base.epochs)
    parser.add_argument("--lr", type=float, default=base.lr)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("language.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
        return
    if arguments.text is None:
        parser.error("name the folder of the text, or --table RESULTS")
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    for seed in arguments.seeds:
        for row in arguments.rows:
            bench.run(row, seed)


if __name__ == "__main__":
    main()
