"""Write golden.json. Run once per new entry; an entry that exists must never change.

python tests/heads/make_golden.py
"""

import json
from pathlib import Path

from fixify.heads import HeadSpec

NAMES = [
    f"{kind}-{n}-{c}-{seed}"
    for kind, sizes in {
        # every path: one class, C <, =, > N, Kerdock, seeded blocks, every construction, prime powers, both at once
        "hadamard": [
            (1, 2), (2, 4), (4, 16), (12, 11), (12, 12), (16, 300), (20, 100), (28, 27), (36, 200), (56, 50), (64, 10),
            (100, 500), (240, 200), (256, 2965), (320, 1000), (676, 1000), (768, 1000), (1280, 1000), (2048, 1000),
            (2048, 18291), (4920, 1000),
        ],
        "orthogonal": [(8, 8), (8, 40), (256, 100), (386, 1000)],
        "simplex": [(8, 9), (64, 10), (256, 257)],
        "identity": [(1, 1), (64, 10), (386, 386)],
    }.items()
    for n, c in sizes
    for seed in (0, 2**64 - 1)
]  # fmt: skip

if __name__ == "__main__":
    path = Path(__file__).parent / "golden.json"
    golden = json.loads(path.read_text()) if path.exists() else {}
    for name in NAMES:
        kind, n, c, seed = name.split("-")
        golden.setdefault(name, HeadSpec(kind, int(n), int(c), seed=int(seed)).resolve().digest)
    path.write_text(json.dumps(golden, indent=1) + "\n")
