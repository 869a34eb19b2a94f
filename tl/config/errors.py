"""Errors that are meant for a person, and the exit codes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from yaml import YAMLError

# What reading a YAML file raises when its content is none.
NO_YAML = (YAMLError, UnicodeDecodeError)


class TlError(Exception):
    """Base of every error that is meant for a person: what is wrong, where, and what to do next.

    `exit_code` is that of the console script: 1 the job failed, 2 the request was wrong.
    """

    exit_code = 1


class RequestError(TlError):
    """The request was wrong (config, data, weights); nothing was written."""

    exit_code = 2


class ProblemsError(RequestError):
    """A request with one or more problems.

    Args:
        problems: One sentence each; all are shown together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(ProblemsError):
    """Settings are unknown, missing, of a wrong type or out of range."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: unwinds like KeyboardInterrupt, but Lightning re-raises it unchanged."""
