"""From which score on a model may be believed: a threshold with a guarantee, chosen on val."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

# Shares of val at which a search begins, and the chance of each that the precision is below the
# wanted one although a threshold was found: 5 % in all. By simulation, more starts find nothing
# on a few hundred images, and fewer nothing where only a small part can be sure.
STARTS = {0.8: 0.02, 0.5: 0.02, 0.2: 0.01}


class Limit(Protocol):
    """What an evaluation needs to know of `Abstain`; a bundle has a class of its own."""

    @property
    def precision(self) -> float:
        """Wanted."""

    @property
    def threshold(self) -> float | None:
        """Smallest score of a sure answer; None: nothing is sure."""

    @property
    def note(self) -> str:
        """One sentence for a person."""


@dataclass(frozen=True)
class Abstain:
    """From which score on an answer is sure.

    Args:
        precision: Wanted share of right answers among the sure ones.
        threshold: Smallest score of a sure answer; None: none can be guaranteed, nothing is sure.
        note: One sentence for a person.
    """

    precision: float
    threshold: float | None
    note: str = ""


def choose_abstain(
    scores: NDArray[np.floating], correct: NDArray[np.bool_], precision: float
) -> Abstain:
    """The lowest score from which on answers have a wanted precision, with 95 % confidence.

    For images like those of val. At each of `STARTS`, the hypothesis that the precision of the
    surest images is below the wanted one is rejected or not by an exact binomial test at the risk
    of that start; from the largest share where it is, the search goes on image by image until a
    test at this risk fails.

    Args:
        scores: Probability of the predicted class, (N,).
        correct: Whether the prediction is right, (N,).
        precision: Wanted, in (0, 1).

    Source: Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk
    control", 2021, algorithm 1 (fixed sequences); Geifman, El-Yaniv, "Selective classification for
    deep neural networks", NeurIPS 2017, on the binomial bound.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, wrong = scores[order], np.cumsum(~correct[order])
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # equal scores go together
    chances = binom.cdf(wrong[ends], ends + 1, 1 - precision)
    last = None
    for share, risk in STARTS.items():
        begin = int(np.searchsorted(ends + 1, share * len(ranked)))
        failed = np.flatnonzero(chances[begin:] > risk)
        if not len(failed) or failed[0] > 0:
            last = int(ends[begin + failed[0] - 1] if len(failed) else ends[-1])
            break
    wanted = f"{100 * precision:g} %"
    if last is None:
        half = (len(ranked) + 1) // 2
        right = f"{100 - 100 * wrong[half - 1] / half:.1f} %"
        note = (
            f"{len(scores)} images of val guarantee {wanted} for no score "
            f"(of the surest half {right} are right)"
        )
        return Abstain(precision, None, note)
    # Halfway to the next image: another machine may compute the last bit of a score otherwise.
    threshold = float(ranked[last] + ranked[last + 1]) / 2 if last < len(ranked) - 1 else 0.0
    part = f"{100 * (last + 1) / len(ranked):.0f} %"
    note = (
        f"answers with a score of {threshold:.3f} or more are right in at least {wanted} of images "
        f"like those of val (95 % confidence): {part} of val"
    )
    return Abstain(precision, threshold, note)
