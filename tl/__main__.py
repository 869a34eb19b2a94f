"""`python -m tl` is `tl`: what launchers of processes call (`torchrun … -m tl train …`)."""

from __future__ import annotations

from tl.pipelines import main

main()
