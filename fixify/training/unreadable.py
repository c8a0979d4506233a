"""What a run says of images that cannot be read."""

from __future__ import annotations

from collections.abc import Callable

from fixify.training.events import Listener, Warned

UNREADABLE_FILE = "unreadable.txt"
_NAMED = 5
_INSTEAD = {"training": "the next one takes its place", "validation": "it is left out"}


def teller(split: str, on_event: Listener) -> Callable[[str, int], None]:
    """What to call with each new unreadable image of "training" or "validation": names the first ones."""

    def tell(message: str, count: int) -> None:
        if count <= _NAMED:
            on_event(Warned(f"{message.rstrip('.')}; {_INSTEAD[split]}."))
        elif count == _NAMED + 1:
            on_event(Warned(f"More {split} images cannot be read: metrics.jsonl counts, {UNREADABLE_FILE} lists them."))

    return tell
