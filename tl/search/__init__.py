"""Search: try settings of a job, keep the best, and say how far that can be trusted.

Each worker process keeps images, model and activation cache for all of its trials, so that a trial
costs its fit alone. The study (Optuna) lies in a file or a database; whoever has the same folder or
database joins.
"""

from __future__ import annotations

from tl.search.errors import SearchError, TrialsError
from tl.search.found import SearchResult
from tl.search.team import Team, labels, open_search, team

__all__ = ["SearchError", "SearchResult", "Team", "TrialsError", "labels", "open_search", "team"]
