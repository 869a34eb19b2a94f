"""The model registry: enter a run's bundle, make it champion where it is not worse, go back.

Every command either does what it says or changes nothing. Nothing here imports torch.
"""

from __future__ import annotations

from tl.registry.errors import BusyError, NotPromotedError, RegistryError
from tl.registry.judging import Judgement
from tl.registry.promoting import Promotion, promote, rollback
from tl.registry.registering import Registered, register
from tl.registry.store import Registry, open_registry, serve_command

__all__ = [
    "BusyError",
    "Judgement",
    "NotPromotedError",
    "Promotion",
    "Registered",
    "Registry",
    "RegistryError",
    "open_registry",
    "promote",
    "register",
    "rollback",
    "serve_command",
]
