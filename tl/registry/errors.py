"""What can be wrong with the registry, or with a model in it."""

from __future__ import annotations

from tl.config import RequestError, TlError


class RegistryError(RequestError):
    """What was asked of the registry cannot be done; nothing was changed."""


class NotPromotedError(TlError):
    """The champion stays: the other version is not good enough, or nobody can tell."""


class BusyError(TlError):
    """Another job is changing the same registered model."""
