"""Make the challenger champion where it is not worse, and go back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tl.bundle import Bundle, BundleError
from tl.config import CHAMPION, PREVIOUS
from tl.registry.errors import BusyError, NotPromotedError, RegistryError
from tl.registry.judging import Judgement, judge
from tl.registry.store import Lock, Registry, asking, locked, model_named, version_called
from tl.registry.versions import TASK, call, check_seal, fetch, noted
from tl.tracking.model import SEAL

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

# Tags of a version: whose place it took (a number), and when.
REPLACED, PROMOTED = "tl.replaced", "tl.promoted"


@dataclass(frozen=True)
class Promotion:
    """Who is champion now, and why.

    Args:
        name: Of the registered model.
        version: Number of the champion.
        former: Number of the one before; None where there was none.
        reasons: Sentences.
        judgement: What the images said; None where nobody asked them.
    """

    name: str
    version: int
    former: int | None
    reasons: list[str]
    judgement: Judgement | None = None


def promote(
    registry: Registry,
    name: str,
    candidate: str,
    *,
    margin: float,
    root: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Promotion:
    """Make a version champion if its seal holds and it is not worse than the champion.

    Args:
        registry: Where.
        name: Of the registered model.
        candidate: Alias or number of the version.
        margin: How much worse it may be; see `tl.evaluation.not_worse`.
        root: Where the champion's test images are, if any must be looked at.
        progress: Called with (done, total) while images are predicted.

    Raises:
        NotPromotedError: It is not good enough, or its seal is broken.
        RegistryError: There is no such model or version, or something to judge it by is missing.
        PairingError: The two have other classes or labels.
        BusyError: Another job is changing the registered model.
    """
    with locked(registry, name) as lock, asking(registry, f"promote a version of {name}"):
        challenger = _candidate(registry, name, candidate)
        champion = version_called(registry, name, CHAMPION)
        if champion is not None and champion.version == challenger.version:
            raise NotPromotedError(f"{name}: {call(challenger)} is the champion already")
        with tempfile.TemporaryDirectory(prefix="tl-promote-") as folder:
            bundle = _sealed(registry, challenger, Path(folder), NotPromotedError)
            if champion is None:
                reasons = ["there was no champion, and its seal holds"]
                _crown(registry, lock, challenger, None, reasons)
                return Promotion(name, int(challenger.version), None, reasons)
            found = judge(
                registry, challenger, champion, bundle, margin=margin, root=root, progress=progress
            )
        reasons = found.words()
        if not found.passed:
            raise NotPromotedError(
                f"{name} keeps its champion, {call(champion)}: {call(challenger)} may be worse\n"
                + "\n".join(reasons)
            )
        _crown(registry, lock, challenger, champion, reasons)
    return Promotion(name, int(challenger.version), int(champion.version), reasons, found)


def rollback(registry: Registry, name: str) -> Promotion:
    """Make the former champion champion again.

    Raises:
        RegistryError: There is none.
        NotPromotedError: Its seal is broken.
        BusyError: Another job is changing the registered model.
    """
    with locked(registry, name) as lock, asking(registry, f"roll {name} back"):
        _known(registry, name)
        champion = version_called(registry, name, CHAMPION)
        former = version_called(registry, name, PREVIOUS)
        if champion is None or former is None:
            what = "former champion" if champion else "champion"
            raise RegistryError(
                f"{name} has no {what} to go back from or to: {_aliases(registry, name)}"
            )
        with tempfile.TemporaryDirectory(prefix="tl-promote-") as folder:
            _sealed(registry, former, Path(folder), NotPromotedError)
        _still(lock, registry, name, champion)
        client = registry.client
        before = former.tags.get(REPLACED)
        known = before is not None and version_called(registry, name, before) is not None
        client.set_registered_model_alias(name, CHAMPION, str(former.version))
        if before is not None and known:
            client.set_registered_model_alias(name, PREVIOUS, before)
        else:
            client.delete_registered_model_alias(name, PREVIOUS)
        _note(registry, former, f"champion again, in place of {call(champion)} (rollback)")
        _note(registry, champion, f"no longer champion: rollback to {call(former)}")
    reasons = ["rollback, and its seal holds"]
    return Promotion(name, int(former.version), int(champion.version), reasons)


def _known(registry: Registry, name: str) -> None:
    """See that there is such a model and that one may change it, before anything takes time."""
    model = model_named(registry, name)
    if model is not None:
        if TASK in model.tags:
            registry.client.set_registered_model_tag(name, TASK, model.tags[TASK])
        return
    found = registry.client.search_registered_models(max_results=100)
    names = [m.name for m in found if TASK in m.tags]
    there = f"there are {', '.join(names)}" if names else "there is none yet"
    raise RegistryError(f"there is no registered model {name!r}; {there}: tl register makes one")


def _candidate(registry: Registry, name: str, candidate: str) -> ModelVersion:
    _known(registry, name)
    found = version_called(registry, name, candidate)
    if found is None:
        what = f"version {candidate}" if candidate.isdigit() else f"version called {candidate}"
        raise RegistryError(
            f"{name} has no {what}: {_aliases(registry, name)}; tl register run=RUN name={name} "
            "enters one"
        )
    if SEAL not in found.tags:
        msg = f"{call(found)} of {name} was not made by tl register, and has no seal to check"
        raise RegistryError(msg)
    return found


def _aliases(registry: Registry, name: str) -> str:
    """What a registered model has, for messages."""
    model = model_named(registry, name)
    known = sorted((model.aliases if model else {}).items())
    return "it has " + (", ".join(f"{a} (version {v})" for a, v in known) or "no aliases")


def _sealed(
    registry: Registry, version: ModelVersion, folder: Path, refusal: type[NotPromotedError]
) -> Bundle:
    """The bundle of a version, whose seal holds."""
    if not version.source:
        raise RegistryError(f"{call(version)} of {version.name} names no model")
    try:
        bundle = fetch(registry, version.source, folder)
        check_seal(bundle, version.tags.get(SEAL))
    except BundleError as error:
        raise refusal(f"{version.name}: the seal of {call(version)} is broken: {error}") from error
    return bundle


def _still(lock: Lock, registry: Registry, name: str, champion: ModelVersion | None) -> None:
    """See that nobody changed the champion since it was judged, just before it is replaced."""
    now = version_called(registry, name, CHAMPION)
    same = (now.version if now else None) == (champion.version if champion else None)
    if not same or not lock.held():
        raise BusyError(f"{name}: somebody changed the champion meanwhile; nothing was done: again")


def _crown(
    registry: Registry,
    lock: Lock,
    version: ModelVersion,
    former: ModelVersion | None,
    reasons: Sequence[str],
) -> None:
    """Give a version the place of the champion.

    The alias of the champion is set once, by one call; what comes before it can be done twice.
    """
    client, name, number = registry.client, version.name, str(version.version)
    _still(lock, registry, name, former)
    if former is not None:
        client.set_model_version_tag(name, number, REPLACED, str(former.version))
        client.set_registered_model_alias(name, PREVIOUS, str(former.version))
    client.set_model_version_tag(name, number, PROMOTED, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    client.set_registered_model_alias(name, CHAMPION, number)
    model = model_named(registry, name)
    for alias, of in (model.aliases if model else {}).items():
        if str(of) == number and alias not in {CHAMPION, PREVIOUS}:
            client.delete_registered_model_alias(name, alias)
    place = f" in place of {call(former)}" if former is not None else ""
    _note(registry, version, f"champion{place}: {'; '.join(reasons)}")
    if former is not None:
        _note(registry, former, f"no longer champion: {call(version)} took its place")


def _note(registry: Registry, version: ModelVersion, words: str) -> None:
    now = registry.client.get_model_version(version.name, str(version.version))
    registry.client.update_model_version(now.name, str(now.version), noted(now, words))
