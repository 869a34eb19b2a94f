"""Promote: make the challenger champion if it is not worse, or go back to the former one."""

from __future__ import annotations

from tl.config import PromoteConfig
from tl.pipelines import loading, run


def promote(config: PromoteConfig) -> int:
    """Judge a registered version against the champion and let the better one serve.

    Args:
        config: The registered model, who wants to be champion, and how much worse it may be.

    Returns:
        Number of the champion.

    Raises:
        NotPromotedError: The champion stays; says why.
        StoreError: The MLflow store does not answer.
        RegistryError: There is no such model or version, or something to judge it by is missing.
        BusyError: Another job is changing that registered model.
    """
    with loading():
        from tl import display, registry

    with registry.open_registry(config.tracking.uri) as store:
        if config.rollback:
            found = registry.rollback(store, config.name)
        else:
            with display.bar("predicting") as progress:
                found = registry.promote(
                    store,
                    config.name,
                    config.candidate,
                    margin=config.margin,
                    root=config.data.root,
                    progress=progress,
                )
    former = "" if found.former is None else f", in place of version {found.former}"
    facts = {"champion": f"version {found.version}{former}", "why": "; ".join(found.reasons)}
    facts["serve it"] = registry.serve_command(store, f"models:/{config.name}@champion")
    if found.former is not None and not config.rollback:
        facts["go back"] = f"tl promote name={config.name} rollback=true"
    display.facts(config.name, facts)
    return found.version


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl promote` and of `python pipelines/promote.py`."""
    run("promote", promote, argv)


if __name__ == "__main__":
    main()
