"""Advice before any training: what was measured, what follows, what it costs, and which backbone."""

from __future__ import annotations

from tl.advice.sections import Section, brief

__all__ = ["Section", "brief"]
