"""Answers of MLflow that come in pages, as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAGE = 1000  # entries of one answer


def all_pages(ask: Callable[[int, str | None], Any]) -> list[Any]:
    """All that a search finds.

    Args:
        ask: One page of it, from the number of entries and the token of the page.
    """
    from mlflow.utils import get_results_from_paginated_fn

    collect: Any = get_results_from_paginated_fn  # without types
    return list(collect(ask, PAGE))


def experiment_ids(client: MlflowClient) -> list[str]:
    """Of all experiments that are not deleted."""
    found = all_pages(lambda n, token: client.search_experiments(max_results=n, page_token=token))
    return [experiment.experiment_id for experiment in found]
