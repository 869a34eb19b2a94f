"""Search: try settings of a job, train the best, and say how far the ranking can be trusted."""

from __future__ import annotations

from tl.config import SearchConfig, to_yaml
from tl.pipelines import loading, run
from tl.pipelines.train import train
from tl.search import SearchResult, labels, open_search, team


def search(config: SearchConfig) -> SearchResult:
    """Try `search.trials` settings, each judged on val alone; the winner becomes a normal run.

    The same command goes on with a search that was interrupted, and joins one under way.

    Raises:
        RequestError: The request was wrong (`ConfigError`, `DataError`, `SearchError`, …).
        TlError: The search failed; the same command goes on with it.
    """
    folder, asked = open_search(config)  # before torch is loaded
    with loading():
        from tl import display, tracking
        from tl.search import ending, setup, trying

        tracking.load(asked.tracking)
    with ending.continued(asked), team(folder, asked) as us:
        place = setup.prepare(us)
        display.facts("search", ending.facts(us, place))
        lines = ending.lines(us, place)
        if not us.leads:
            ending.work(us, place, lines)
            if not us.try_to_lead():  # somebody is there to end it
                return ending.joined(us, place)
        with tracking.start_run(**labels(us)) as tracked, tracking.above(folder.path):
            trying.put_below(place, tracked.run_id)
            params = ending.params(us, place)
            tracked.log_job(params, to_yaml(us.asked), place.bench.table.fingerprint())
            while True:
                ending.work(us, place, lines)
                if trying.wait_for_others(place, us, lines):
                    break
            found = ending.judged(us, place)
            best = None
            if asked.search.finish:
                best = train(ending.winner(us, place, found))
            result = ending.write(us, place, found, best)
            tracked.log_results(ending.metrics(found, best), len(found.ranked), folder.path)
            for page in ending.pages(folder):
                tracked.log_file(page)
        ending.show(us, place, found, best)
    return result


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl search` and of `python pipelines/search.py`."""
    run("search", lambda config: search(config).headline, argv)


if __name__ == "__main__":
    main()
