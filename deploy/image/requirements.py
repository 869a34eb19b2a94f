"""Lists what the image installs, one file for each of its layers.

    python requirements.py pyproject.toml constraints.txt OUT [EXTRA…]

`OUT/cuda.txt` has the CUDA libraries that torch's wheels of PyPI ask for, `OUT/torch.txt` torch
and torchvision, `OUT/rest.txt` everything else, with the extras. The first two rarely change and
are most of the image, so each is a layer of its own. Only Python's own library is used: this runs
in the base image, before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PAIR = ("torch", "torchvision")
CUDA = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton==)")


def asked(project: dict, extras: list[str]) -> list[str]:
    """Requirements of the project with these extras, those that extras name in turn included."""
    found, seen, waiting = list(project["dependencies"]), set(), list(extras)
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in project["optional-dependencies"]:
            known = ", ".join(sorted(project["optional-dependencies"]))
            sys.exit(f"EXTRAS names {extra!r}, which pyproject.toml does not have; it has {known}")
        for requirement in project["optional-dependencies"][extra]:
            if own := re.fullmatch(rf"{project['name']}\[([^\]]+)\]", requirement):
                waiting += [name.strip() for name in own[1].split(",")]
            else:
                found.append(requirement)
    return sorted(set(found))


def layers(requirements: list[str], versions: list[str]) -> dict[str, list[str]]:
    """The lines of each layer's file."""
    return {
        "cuda": [line for line in versions if CUDA.match(line)],
        "torch": [line for line in versions if line.partition("==")[0] in PAIR],
        "rest": [r for r in requirements if re.split(r"[=<>!~\[;]", r)[0] not in PAIR],
    }


def main(project: str, constraints: str, out: str, *extras: str) -> None:
    """Write the files."""
    asks = asked(tomllib.loads(Path(project).read_text())["project"], list(extras))
    for name, lines in layers(asks, Path(constraints).read_text().splitlines()).items():
        Path(out, f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
