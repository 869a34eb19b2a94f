"""Whether a pass over a loader waits for images, or for what is done with them."""

from __future__ import annotations

from dataclasses import dataclass

SHARE, SECONDS = 0.15, 1.0  # waiting that is worth a word: of the pass, and at all


@dataclass
class Meter:
    """Seconds and images of one pass; the first batch, before which processes start, is left out.

    Args:
        workers: Loader processes; 0: images are read in between.
        images: How many were handed out.
        waited: Seconds until they were there.
        worked: Seconds that the receiver took with them.
    """

    workers: int
    images: int = 0
    waited: float = 0.0
    worked: float = 0.0

    def bottleneck(self) -> str:
        """A sentence with both rates where the receiver waited for images; else empty.

        Example:
            >>> Meter(2, images=1000, waited=6.0, worked=4.0).bottleneck()  # doctest: +ELLIPSIS
            'decoding is the bottleneck: 100 images/s are read, the network could take 250; ...'
        """
        whole = self.waited + self.worked
        if self.waited < SECONDS or self.waited < SHARE * whole:
            return ""
        if not self.workers and self.waited < self.worked:
            return ""
        # Processes read all the time; without them, reading and working take turns.
        read = self.images / (whole if self.workers else self.waited)
        taken = f"{self.images / self.worked:,.0f}" if self.worked else "more"
        return (
            f"decoding is the bottleneck: {read:,.0f} images/s are read, the network could take "
            f"{taken}; more cores, smaller image files"
            f"{'' if self.workers else ', loader processes (data.num_workers)'} or cache=on help"
        )
