"""The thread that sends what a job records, while the job goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tl.config import TlError

from .processes import BEAT_SECONDS, beat, revive
from .spool import Spool
from .store import reason_of, redacted
from .writer import AwayError, LostError, Writer

log = logging.getLogger(__name__)

SECONDS = 5.0  # between two looks for new records, so that many go in one request
RETRY_SECONDS = (1.0, 60.0)  # after a failure: the first pause, and the longest
LONG_SECONDS = 30.0  # of failures, after which the end of the job does not wait for long
LARGE_SECONDS = 20.0  # of patience with a record, from which it is a large file
GIVEN_UP_SECONDS = 2.0  # that it waits then
LATE_SECONDS = 600.0  # since the last sign of life, after which somebody may have closed the run


class Sender:
    """Sends the records of a spool from a thread of its own.

    Args:
        writer: Knows the store and the spool.
        then: Called once in the thread after the first records were taken.
    """

    def __init__(self, writer: Writer, then: Callable[[Writer], None] | None = None) -> None:
        self.writer = writer
        self.failure: AwayError | LostError | TlError | None = None  # of the last attempt
        self._then = then
        self._changed = threading.Condition()
        self._attempts = 0  # that ended, well or not
        self._well = time.monotonic()  # when the store last took all, or the job began
        self._hurry = threading.Event()
        self._stopped = False
        self._warned = False
        self._pause = RETRY_SECONDS[0]
        self._again = 0.0  # when files are tried once more
        self._beat = 0.0  # when the last sign of life was sent
        self._thread = threading.Thread(target=self._run, name="tl.tracking", daemon=True)

    @property
    def spool(self) -> Spool:
        """What is sent."""
        return self.writer.spool

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def hurry(self) -> None:
        """Send what there is now, instead of at the next look."""
        self._hurry.set()

    def attempted(self, seconds: float) -> bool:
        """Wait until one attempt has ended; False where none did within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._attempts > 0, seconds)

    def drain(self, seconds: float, tries: int = 2) -> bool:
        """Wait until the store has all.

        Args:
            seconds: How long to wait for a store that takes nothing; a large file under way may
                take longer. For one that has been away for half a minute two seconds are enough.
            tries: After so many failures the wait ends at once, unless the store is just slow.

        Returns:
            Whether the store has all.
        """
        failed, last, began = 0, self._attempts, time.monotonic()
        if self.failure is not None and began - self._well > LONG_SECONDS:
            seconds = min(seconds, GIVEN_UP_SECONDS)
        while not self.spool.empty:
            self.hurry()
            with self._changed:
                self._changed.wait(0.1)  # woken by each attempt
                if self._attempts > last:
                    failed = failed + 1 if self.failure else 0
                    last = self._attempts
            slow = "timed out" in str(self.failure) or "timeout" in str(self.failure)
            if (failed >= tries and not slow) or not self._thread.is_alive():
                return self.spool.empty
            large = self.writer.patience if self.writer.patience > LARGE_SECONDS else 0
            if time.monotonic() - max(began, self.writer.progress) > max(seconds, large):
                return False
        return True

    def stop(self) -> None:
        """End the thread; a request under way is left to itself."""
        self._stopped = True
        self.hurry()
        self._thread.join(0.5)

    def _run(self) -> None:
        while not self._ended():
            self._attempt()
            in_hurry = self._hurry.wait(SECONDS if self.failure is None else self._pause)
            if in_hurry and self.failure is not None and not self._ended():
                time.sleep(min(self._pause, RETRY_SECONDS[0]))
            self._hurry.clear()

    def _ended(self) -> bool:
        return self._stopped

    def _attempt(self) -> None:
        failure: TlError | None = None
        try:
            now, again = time.monotonic(), self._hurry.is_set()
            if again or now > self._again:
                again, self._again = True, now + RETRY_SECONDS[1]
            self.writer.send(again=again)
            self.spool.settle()
            self._say_alive()
        except (AwayError, LostError) as error:
            failure = error
        except TlError as error:  # the disk is full
            failure = error
        except Exception as error:  # a bug, or a spool that somebody removed
            if self._ended():
                return
            log.debug("sending failed", exc_info=True)
            failure = AwayError(f"{type(error).__name__}: {reason_of(error)}")
        self._tell(failure)
        with self._changed:
            self.failure = failure
            self._attempts += 1
            if failure is None:
                self._well = time.monotonic()
            self._changed.notify_all()
        if failure is None and self._then is not None:
            then, self._then = self._then, None
            try:
                then(self.writer)
            except Exception as error:  # the records of other runs are no matter of this job
                log.debug("runs of other jobs were not looked at: %s", reason_of(error))

    def _tell(self, failure: TlError | None) -> None:
        """Say once that the store is away, and once that it is back."""
        store = redacted(self.writer.uri)
        if failure is None:
            if self._warned:
                log.warning("the MLflow store %s has all records again", store)
            self._warned, self._pause = False, RETRY_SECONDS[0]
            return
        self._pause = min(2 * self._pause, RETRY_SECONDS[1])
        if not self._warned and not self._stopped:
            self._warned = True
            log.warning(
                "the MLflow store %s does not take records (%s); the job goes on, they wait in %s",
                store, failure, self.spool.folder,
            )  # fmt: skip

    def _say_alive(self) -> None:
        """Renew the sign of life by which others know that the run is no dead one."""
        taken, now = self.spool.taken, time.monotonic()
        run_id = taken.runs.get(taken.job)
        if run_id is None or self.writer.ended or now - self._beat < BEAT_SECONDS:
            return
        try:
            if self._beat and now - self._beat > LATE_SECONDS:
                revive(self.writer.client, run_id)
            beat(self.writer.client, run_id)
        except Exception as error:
            raise AwayError(reason_of(error)) from error
        self._beat = now
