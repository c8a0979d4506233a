"""Images that cannot be read: known by name, and fatal when they are too many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fixify.errors import DataError


@dataclass(frozen=True)
class Unreadable:
    """One of them. It travels from a loader process as a value: an exception would arrive as a traceback."""

    message: str
    hint: str | None = None


class UnreadableImages:
    """Those of a data set that were found so far, each counted once.

    Args:
        num_images: Images in the data set.
        max_share: Share of them that may be unreadable; 0 makes the first one an error.
        on_found: Told of each new one: what is wrong with it, and how many there are now.

    What names an image is its message: several loaders may count the images of one data set.

    Attributes:
        messages: What is wrong with each, with its name; in the order in which they were found.
    """

    def __init__(
        self, num_images: int, max_share: float = 0.0, on_found: Callable[[str, int], object] | None = None
    ) -> None:
        self.num_images = num_images
        self.max_share = max_share
        self.on_found = on_found
        self.messages: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, found: Unreadable) -> None:
        """Count an image.

        Raises:
            DataError: it is one too many.
        """
        if found.message in self.messages:
            return
        self.messages[found.message] = None
        count = len(self.messages)
        if self.max_share == 0:
            raise DataError(found.message, hint=found.hint)
        if count > self.max_share * self.num_images:
            raise DataError(
                f"{count:,} of {self.num_images:,} images cannot be read, and {self.max_share:g} of them may be "
                f"(--max-unreadable). The last one: {found.message}",
                hint=f"{found.hint or ''} Or allow more: --max-unreadable {10 * self.max_share:g}".strip(),
            )
        if self.on_found is not None:
            self.on_found(found.message, count)
