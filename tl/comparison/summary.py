"""What a comparison comes to, in a few plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tl.comparison.words import NAMES, counted, difference_words, some_names, value_words

MANY = 5  # runs on one test split from which choosing the best flatters it worth saying


def summary_of(found: Mapping[str, Any]) -> list[str]:
    """Sentences, the most important first.

    Args:
        found: The content of `compare.json` without its summary.
    """
    left = [run for run in found["runs"] if run["group"] is None]
    main = [run for run in found["runs"] if run["group"] == 0]
    if not main:
        return ["No run can be compared: see why at each run."]
    sentences = [_best(found, main), *_verdicts(found, main), *_beyond(found)]
    sentences += [*_cautions(found, main), *_others(found, left)]
    return [s for s in sentences if s]


def _best(found: Mapping[str, Any], main: Sequence[Mapping[str, Any]]) -> str:
    best, metric = main[0], found["metric"]
    images = found["groups"][0]["images"]
    value = value_words(best["value"], metric)
    ends = f"{value_words(best['low'], metric)} to {value_words(best['high'], metric)}"
    highest = "Lowest" if found["lower_is_better"] else "Highest"
    what = f"{NAMES[metric]} on {images:,} {found['split']} images"
    equal = [run["short"] for run in main if run["value"] == best["value"]]
    if 1 < len(equal) < len(main):
        return (
            f"{highest} {what} of {len(main):,} runs: {counted(len(equal), 'run')} with {value} "
            f"each ({ends}), {some_names(equal)}, the cheapest first."
        )
    if len(main) == 1:
        return f"{best['name']}: {what} {value} ({ends}); there is no other run to compare it with."
    return f"{highest} {what} of {len(main):,} runs: {best['short']} with {value} ({ends})."


def _verdicts(found: Mapping[str, Any], main: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the reference against each other run of its group."""
    names = {run["id"]: run["short"] for run in main}
    reference = found["reference"]
    beaten: list[str] = []
    better: list[str] = []
    unclear: list[str] = []
    for pair in found["pairs"]:
        if reference not in (pair["a"], pair["b"]) or pair["verdict"] == "incomparable":
            continue
        other = pair["b"] if pair["a"] == reference else pair["a"]
        winner = {"a": pair["a"], "b": pair["b"]}.get(pair["verdict"])
        kind = unclear if winner is None else beaten if winner == reference else better
        if other in names:
            kind.append(names[other])
    if len(main) == 2 and found["pairs"]:
        words = next(p["words"] for p in found["pairs"] if p["verdict"] != "incomparable")
        return [words[0].upper() + words[1:].rstrip(".") + "."]
    name = names.get(reference, "")
    texts = []
    if better:
        texts.append(f"Better than {name}: {len(better):,} ({some_names(better)}).")
    if beaten:
        texts.append(f"{name} beats {len(beaten):,} ({some_names(beaten)}).")
    if unclear:
        reach = max(p["detectable"] or 0 for p in found["pairs"] if p["verdict"] != "incomparable")
        shows = difference_words(reach, found["metric"], sign=False)
        texts.append(
            f"No difference can be shown between {name} and {len(unclear):,} "
            f"({some_names(unclear)}): these images show differences from about {shows} on, in a "
            "comparison of two runs alone."
        )
    return texts


def _beyond(found: Mapping[str, Any]) -> list[str]:
    pairs = found["family_pairs"]
    if len(pairs) == 1:
        words = pairs[0]["words"]
        return [words[0].upper() + words[1:] + "."]
    if pairs:
        won = [p for p in pairs if p["verdict"] == "a"]
        best = found["families"][pairs[0]["a"]]["name"]
        return [
            f"Over several seeds {best} has the best mean; beyond these seeds it beats "
            f"{len(won) or 'none'} of {len(pairs):,} other settings."
        ]
    seeds = {run["seed"] for run in found["runs"] if run["group"] == 0}
    count = sum(run["group"] == 0 for run in found["runs"])
    if count > 1 and not found["families"] and len(seeds) <= 1:
        return [
            "All runs have one seed each: a verdict is about these very models, and another seed "
            "of the same settings may turn it; -m seed=0,1,2 shows how much a seed does."
        ]
    return []


def _cautions(found: Mapping[str, Any], main: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = []
    if found["split"] == "val":
        texts.append(
            "These are val images, on which training chose its epochs, and perhaps you your "
            "settings: the figures flatter all runs. A test split that nobody chose by would tell."
        )
    if len(main) >= MANY and found["optimism"]:
        flatter = difference_words(found["optimism"], found["metric"], sign=False)
        texts.append(
            f"{len(main):,} models were judged on these {found['split']} images: being the best of "
            f"so many alone gives about {flatter}, by which the best looks better than it is."
        )
    copies = found["groups"][0]["copies"]
    if copies:
        texts.append(f"{counted(copies, 'image')} came more than once, and counted once.")
    return texts


def _others(found: Mapping[str, Any], left: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = []
    others = found["groups"][1:]
    if others:
        count = sum(len(group["runs"]) for group in others)
        word = "group is" if len(others) == 1 else "groups are"
        texts.append(
            f"{counted(count, 'more run')} in {len(others):,} other {word} not comparable with "
            "these: other images, labels or classes."
        )
    if left:
        reasons = {run["why_not"] for run in left}
        why = f": {next(iter(reasons))}" if len(reasons) == 1 else "; each says why"
        are = "is" if len(left) == 1 else "are"
        texts.append(f"{counted(len(left), 'run')} {are} left out{why}.")
    return texts
