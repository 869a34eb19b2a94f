"""Register: enter the model of a finished run into the registry."""

from __future__ import annotations

from tl.config import RegisterConfig
from tl.pipelines import loading, run


def register(config: RegisterConfig) -> int:
    """Make a run's bundle a version of a registered model.

    Args:
        config: The run, the name of the registered model, and the alias of the version.

    Returns:
        Number of the version.

    Raises:
        StoreError: The MLflow store does not answer.
        UnknownRunError: No single run is what `config.run` says.
        RegistryError: The run has no bundle that is whole, or the name is taken.
        BusyError: Another job is changing that registered model.
    """
    with loading():
        from tl import display, registry
        from tl.tracking.finding import store_named

    with registry.open_registry(config.tracking.uri, store_named(config.run)) as store:
        found = registry.register(store, config.run, config.name, config.alias)
    facts = {
        "version": f"{found.version}, {'new' if found.new else 'registered already'}",
        "alias": f"{found.alias}, and it stays that: nothing was changed"
        if found.alias != config.alias
        else found.alias,
        "run": found.run_id,
        "serve it": registry.serve_command(store, found.address),
    }
    if found.alias != "champion":
        facts["make it champion"] = f"tl promote name={config.name}" + (
            "" if found.alias == "challenger" else f" candidate={found.alias}"
        )
    display.facts(config.name, facts)
    return found.version


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl register` and of `python pipelines/register.py`."""
    run("register", register, argv)


if __name__ == "__main__":
    main()
