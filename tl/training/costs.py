"""Whether computing the frozen part once per image pays: a sum of seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from tl.cache import size_text

SAFETY = 1.1  # of disk space, and of seconds: near a tie, nothing is gained by files
WORTH_SECONDS = 5.0  # finding the frontier, its proof and an engine take some of them


@dataclass(frozen=True)
class PhaseCosts:
    """What a phase costs either way, before it begins.

    Args:
        epochs: Passes that are planned.
        train_images: Images of train.
        val_images: Images of val.
        views: Kept for each image of train, the clean one among them.
        missing: Views of images that are not in the cache yet.
        whole_train: Seconds an image of a training step of the whole model, decoding included.
        whole_eval: Seconds an image of evaluation with the whole model, decoding included.
        prefix: Seconds an image of the frozen part in PyTorch, decoding included.
        suffix_train: Seconds an image of a training step above the frontier.
        suffix_eval: Seconds an image of evaluation above the frontier.
        bytes_per_view: Size of what is kept of one view of one image.
        disk_free: Bytes free where the cache is.
        limit: Bytes that the cache may hold.
    """

    epochs: int
    train_images: int
    val_images: int
    views: int
    missing: int
    whole_train: float
    whole_eval: float
    prefix: float
    suffix_train: float
    suffix_eval: float
    bytes_per_view: int
    disk_free: int
    limit: int

    @property
    def uncached(self) -> float:
        """Seconds of the planned epochs with the whole model."""
        train, val = self.train_images * self.whole_train, self.val_images * self.whole_eval
        return self.epochs * (train + val)

    @property
    def cached(self) -> float:
        """Seconds of filling the cache in PyTorch and of the planned epochs above the frontier."""
        train, val = self.train_images * self.suffix_train, self.val_images * self.suffix_eval
        return self.missing * self.prefix + self.epochs * (train + val)

    @property
    def bytes(self) -> int:
        """Size of what the phase reads."""
        return (self.train_images * self.views + self.val_images) * self.bytes_per_view

    @property
    def new_bytes(self) -> int:
        """Size of what must be written."""
        return self.missing * self.bytes_per_view


@dataclass(frozen=True)
class Decision:
    """Whether a phase reads the cache, and why, for a person."""

    use: bool
    reason: str


def worth_finding(seconds: float) -> bool:
    """Whether so many seconds with the whole model are worth looking for the frontier."""
    return seconds >= WORTH_SECONDS


def decide(costs: PhaseCosts, *, forced: bool) -> Decision:
    """Compare seconds, and see that the bytes fit.

    Args:
        costs: Of the phase.
        forced: `cache=on`: the seconds do not matter; the bytes still do.
    """
    size = f"{size_text(costs.bytes)} ({size_text(costs.new_bytes)} of it new)"
    if costs.bytes > costs.limit:
        limit = size_text(costs.limit)
        return Decision(False, f"it needs {size}, more than cache.max_gb allows ({limit})")
    if costs.new_bytes * SAFETY > costs.disk_free:
        return Decision(False, f"it needs {size}, the disk has {size_text(costs.disk_free)} free")
    seconds = (
        f"{human_seconds(costs.cached)} instead of {human_seconds(costs.uncached)} "
        f"for {costs.epochs} epochs (estimated)"
    )
    text = f"{seconds}, {size}, {size_text(costs.disk_free)} free on disk"
    if forced or costs.cached * SAFETY < costs.uncached:
        return Decision(True, text)
    return Decision(False, f"it would take {text}")


def human_seconds(number: float) -> str:
    """Seconds for a person.

    Example:
        >>> human_seconds(4.21), human_seconds(250)
        ('4.2 s', '4 min 10 s')
    """
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds} s"
