"""Send what waits in the folders of runs, after their jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl.config import ProblemsError, RequestError, TrackingConfig

from .processes import PROCESS_GONE
from .records import RECORD, RunRecord, read_record
from .run import SHOWN, counted, tracking_uri
from .spool import FOLDER, RECORDS, BusyError, Spool, waits
from .store import default_uri, mlflow_settings, redacted
from .writer import AwayError, LostError, Writer


@dataclass(frozen=True)
class Synced:
    """What became of one run.

    Args:
        folder: Of the run.
        words: For a person.
        sent: Records that the store took now.
        waiting: Records that it has not.
        uri: Address of the store, where it is known.
        answers: Whether it answered.
        in_use: Whether a living process sends the records itself.
    """

    folder: Path
    words: str
    sent: int = 0
    waiting: int = 0
    uri: str | None = None
    answers: bool = False
    in_use: bool = False


def runs_below(folders: Sequence[Path]) -> list[Path]:
    """Folders of runs among `folders` and below them; those above others come first.

    Raises:
        ProblemsError: Some hold none.
    """
    found: dict[Path, None] = {}
    problems = []
    for folder in folders:
        own = [folder] if (folder / RECORD).is_file() or waits(folder) else []
        # Its children wait for it, and so are sent with it.
        below = {p.parent.parent for p in folder.rglob(f"{FOLDER}/{RECORDS}")}
        if not own:
            below |= {p.parent for p in folder.rglob(RECORD)}
        runs = own + sorted(below - {folder}, key=lambda p: (len(p.parts), p))
        if not runs:
            why = f"it holds no {RECORD}" if folder.is_dir() else "there is no such folder"
            problems.append(f"{folder} is no run that MLflow knows: {why}")
        found |= dict.fromkeys(runs)
    if problems:
        raise ProblemsError(problems)
    return [*found]


def sync_run(folder: Path, uri: str | None = None) -> Synced:
    """Send what waits in the folder of a run, and end its run as its job ended.

    Args:
        folder: Of the run.
        uri: Address of the store; default: where the job began.

    Raises:
        RequestError: The address is not known, as it had a password in it.
        TlError: The folder cannot be written, or `run.json` is damaged.
    """
    known = read_record(folder)
    if not waits(folder):
        return Synced(folder, _nothing(known), uri=uri or _address(known))
    try:
        spool = Spool(folder, make=False)
    except BusyError as error:
        words = f"in use by {error.owner}: the job itself, or another tl sync, sends the records"
        return Synced(folder, words, in_use=True)
    try:
        return _send(folder, spool, known, uri)
    finally:
        spool.close()


def _nothing(known: Mapping[str, Any]) -> str:
    where = f"run {known.get('run_id')} at {known.get('tracking_uri')}"
    return f"nothing waits; {where}, {known.get('status')}"


def _address(known: Mapping[str, Any]) -> str | None:
    address = str(known.get("tracking_uri") or "")
    return address if address and "***@" not in address else None


def _send(folder: Path, spool: Spool, known: Mapping[str, Any], uri: str | None) -> Synced:
    begun, ended = _first_and_last(spool)
    address = uri or _address({**begun, **known})
    if address is None:
        raise RequestError(
            f"{folder}: its store {known.get('tracking_uri')} had a password in its address, which "
            "is not kept: name it with tracking.uri="
        )
    address = default_uri(TrackingConfig(uri=address))
    job = str(begun.get("job") or known.get("job") or "")
    record = RunRecord(folder, job, address, str(begun.get("experiment") or ""), known)
    if ended is None and begun:
        ended = _end_killed(spool)
    status = str(ended.get("status")) if ended else str(known.get("status"))
    writer = Writer(address, spool, record.opened)
    record.begin(status=status, waiting=spool.waiting())
    why = ""
    with mlflow_settings(address, retries=1), tracking_uri(address):
        try:
            writer.send()
        except (AwayError, LostError) as error:
            why = str(error)
    waiting, refused = spool.waiting(), spool.refused()
    record.end(status, waiting, known.get("usage_samples"))
    spool.close(remove=not waiting)
    words = f"sent {counted(writer.sent)}" if writer.sent else "sent nothing"
    if waiting:
        words += f"; {counted(waiting)} still wait: the MLflow store {redacted(address)} does not "
        words += f"take them ({why or writer.trouble})"
    else:
        words += f"; run {spool.taken.runs.get(job)} at {redacted(address)} is complete, {status}"
    if refused:
        words += f"; {counted(len(refused))} refused, kept in {spool.folder}: "
        words += "; ".join(refused[:SHOWN])
    return Synced(folder, words, writer.sent, waiting, address, answers=not why)


def _first_and_last(spool: Spool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """How the last job in a spool began, and how it ended; None where it was killed."""
    begun: dict[str, Any] = {}
    ended: dict[str, Any] | None = None
    offset = 0
    while entries := spool.read(offset):
        for entry in entries:
            kind = (entry.record or {}).get("op")
            if kind == "run":
                begun, ended = entry.record or {}, None
            elif kind == "status":
                ended = entry.record
        offset = entries[-1].end
    return begun, ended


def _end_killed(spool: Spool) -> dict[str, Any]:
    """Say at the end of a spool what its job could not: that it was killed, and when at most."""
    last = int(1000 * (spool.folder / RECORDS).stat().st_mtime)
    ended = {"op": "status", "status": "KILLED", "time": last}
    spool.append(ended)
    spool.append(
        {"op": "tags", "values": {PROCESS_GONE: "its process ended without a word; tl sync"}}
    )
    return ended
