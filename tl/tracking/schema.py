"""Whether a database has the tables of this MLflow, asked before MLflow changes them unasked.

MLflow upgrades a database of an older version in silence where tables are missing, and says of a
newer one that it were out of date.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

QUERY = "SELECT version_num FROM alembic_version"


def version_of_file(file: Path) -> str | None:
    """Revision of the tables in an SQLite file; None where MLflow has made none."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute(QUERY).fetchone()
    except sqlite3.Error:
        return None
    return str(found[0]) if found else None


def version_of_engine(engine: Engine) -> str | None:
    """Revision of the tables in another database; None where MLflow has made none."""
    from sqlalchemy import inspect, text

    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        found = connection.execute(text(QUERY)).scalar()
    return str(found) if found else None


def trouble(found: str | None, uri: str) -> str | None:
    """What to do about tables of another MLflow; None where they are of this one, or missing.

    Args:
        found: Revision of the tables.
        uri: Address of the database, for the command that upgrades it.
    """
    if found is None or found == _revisions()[1]:
        return None
    if found in _revisions()[0]:
        return (
            "its tables are of an older MLflow than the installed "
            f"{version('mlflow')}; make a copy of it, then run: mlflow db upgrade {uri}"
        )
    return (
        f"its tables are of a newer MLflow than the installed {version('mlflow')}: install that one"
    )


@cache
def _revisions() -> tuple[frozenset[str], str]:
    """All revisions that the installed MLflow knows, and the last of them."""
    known, before = set(), set()
    for file in files("mlflow.store.db_migrations").joinpath("versions").iterdir():
        if not file.name.endswith(".py"):
            continue
        text = file.read_text(encoding="utf-8")
        known |= set(re.findall(r"^revision\s*=\s*['\"](\w+)", text, re.MULTILINE))
        for line in re.findall(r"^down_revision\s*=\s*(.*)$", text, re.MULTILINE):
            before |= set(re.findall(r"['\"](\w+)['\"]", line))
    (last,) = known - before
    return frozenset(known), last
