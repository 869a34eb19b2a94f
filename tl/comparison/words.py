"""Verdicts in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tl.evaluation import PairResult

NAMES = {"acc": "accuracy", "map": "mAP", "mae": "mean absolute error"}
SEPARATOR = " · "  # between the parts of the name of a run
MOST_IMAGES = 100_000_000  # more images than that are no advice


def value_words(value: float, metric: str) -> str:
    """A headline for people.

    Example:
        >>> value_words(0.9523, "acc"), value_words(3.14159, "mae")
        ('95.2 %', '3.142')
    """
    return f"{value:.4g}" if metric == "mae" else f"{100 * value:.1f} %"


def difference_words(value: float, metric: str, *, sign: bool = True) -> str:
    """A difference of headlines: points in a hundred, or units of the target.

    Example:
        >>> difference_words(-0.0123, "acc"), difference_words(0.0123, "map", sign=False)
        ('-1.2 points', '1.2 points')
    """
    if metric == "mae":
        return f"{value:+.3g}" if sign else f"{value:.3g}"
    return f"{100 * value:+.1f} points" if sign else f"{100 * value:.1f} points"


def pair_words(
    a: str, b: str, r: PairResult, verdict: str, metric: str, p: float, confidence: float = 0.95
) -> str:
    """The verdict on a and b in a sentence or two.

    Args:
        a: Name of one run.
        b: Of the other.
        r: What the images say.
        verdict: With the other comparisons counted: a, b or none.
        metric: `acc`, `map` or `mae`.
        p: As the verdict takes it.
        confidence: Of the interval.
    """
    interval = f"{_bare(r.low, metric)} to {difference_words(r.high, metric)}"
    size = f"{difference_words(r.difference, metric)}, {100 * confidence:g} % interval {interval}"
    if r.only_a is not None and r.only_b is not None:
        size += f"; only the first has {counted(r.only_a, 'image')} right, only the second "
        size += f"{r.only_b:,}"
    if verdict == "a":
        return f"{a} beats {b} ({size}; p {_p(p)})"
    if verdict == "b":
        return f"{b} beats {a} ({size}; p {_p(p)})"
    return (
        f"no difference can be shown between {a} and {b} ({size}; p {_p(p)}). {_telling(r, metric)}"
    )


def _telling(r: PairResult, metric: str) -> str:
    """What sample size would tell."""
    if r.only_a == r.only_b == 0:
        return "They are right and wrong on the same images"
    reach = difference_words(r.detectable, metric, sign=False)
    shows = f"These {r.images:,} images can show differences of about {reach}"
    if r.images_needed is None or r.images_needed > MOST_IMAGES:
        return f"{shows}; there is none to look for"
    if r.images_needed <= r.images:
        return f"{shows}; by itself this pair would differ, among so many pairs chance does as much"
    return f"{shows}; if this difference is real, about {_round(r.images_needed):,} would show it"


def incomparable_words(a: str, b: str, why: str) -> str:
    """Why two runs are not compared."""
    return f"{a} and {b} are not comparable: {why}"


def short_names(names: Mapping[str, str]) -> dict[str, str]:
    """Names without the parts that all runs have in common, where that tells them apart still.

    Args:
        names: Id of a run -> its name.

    Example:
        >>> short_names({"1": "birds · resnet50 · lp_ft · 1f3c", "2": "birds · vit · lp_ft · a0b1"})
        {'1': 'resnet50 · 1f3c', '2': 'vit · a0b1'}
    """
    parts = {run: name.split(SEPARATOR) for run, name in names.items()}
    if len({len(each) for each in parts.values()}) != 1:
        return dict(names)
    differ = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
    short = {
        run: SEPARATOR.join(part for part, own in zip(each, differ, strict=True) if own)
        for run, each in parts.items()
    }
    return short if len(set(short.values())) == len(set(names.values())) > 1 else dict(names)


def counted(number: int, what: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "run"), counted(2000, "run")
        ('1 run', '2,000 runs')
    """
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def some_names(names: Sequence[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left:,} more" if left > 0 else "")


def _bare(value: float, metric: str) -> str:
    return difference_words(value, metric).removesuffix(" points")


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def _round(images: int) -> int:
    """Two digits: more would pretend a precision that such a forecast has not."""
    digits = max(len(str(images)) - 2, 0)
    step: int = 10**digits
    return -(-images // step) * step
