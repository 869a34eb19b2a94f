"""What the pages say is true: commands, settings, links, and the page written from the code."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tl
from tl.config import PIPELINES, ConfigError, schema_keys
from tl.pipelines.commandline import check_overrides, spelled

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
LINKED = [*PAGES, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"bash", "sh"}
# A command in the text, such as `tl train finetune=lp_ft`, may leave out what is required.
LEFT_OUT = " is required: "
FILE_ENDINGS = re.compile(
    r"\.(json|html|yaml|csv|parquet|png|onnx|safetensors|pth|txt|md|db|ckpt|toml|py)$"
)
PLACEHOLDERS = {"key=value", "group=name"}
# What MLflow calls otherwise than the config does: parameters and tags of a run.
MLFLOW_NAMES = {
    *("data.sha256", "data.test_sha256", "data.images", "data.classes"),
    *("model.weights_source", "model.weights_sha256", "model.parameters"),
}


def blocks(text: str, languages: set[str]) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def arguments(line: str) -> list[str] | None:
    """What follows `tl` in a shell line, or `tl:latest` in `docker run`; else None."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    ends = [i for i, word in enumerate(words) if word in {"|", "||", "&&", ">", "2>", ";", "&"}]
    words = words[: ends[0]] if ends else words
    if words[:1] == ["tl"] or (words and words[0].endswith("/tl")):
        return words[1:]
    if words[:2] == ["docker", "run"] and "tl:latest" in words and "--entrypoint" not in words:
        return words[words.index("tl:latest") + 1 :]
    return None


def problems_of(args: list[str], *, whole: bool) -> list[str]:
    """What is wrong with a command line; without `whole` it may be cut short."""
    shown = [a for a in args if a not in {"…", "..."}]
    if not shown or shown[0] in {"--help", "--version", "PIPELINE"} or shown[1:2] == ["--help"]:
        return []
    if shown[0] not in PIPELINES:
        return [f"there is no pipeline {shown[0]}"]
    try:
        given = spelled(shown[0], shown[1:])
        check_overrides(shown[0], given)
        cut = len(shown) < len(args)
        if whole and not cut and not {"-m", "--config-dir", "--cfg"} & set(shown):
            tl.compose(shown[0], given)
    except ConfigError as error:
        return [p for p in error.problems if whole or LEFT_OUT not in p]
    return []


@cache
def known_keys() -> set[str]:
    return {key for schema in PIPELINES.values() for key, _, _ in schema_keys(schema)}


def key_problem(text: str) -> str | None:
    """A dotted name that stands below a group of the schema, but is no key of it."""
    name = re.fullmatch(r"([a-z_]+)((?:\.[\w<>]+)+)", text)
    groups = {key.split(".")[0] for key in known_keys() if "." in key}
    if not name or name[1] not in groups or FILE_ENDINGS.search(text) or text in MLFLOW_NAMES:
        return None
    key = re.sub(r"^(finetune\.phases\.)[\w<>]+(?=\.|$)", r"\1<name>", text)
    if key in known_keys() or key == "finetune.phases.<name>":
        return None
    return f"{text} is no setting"


def assignment_problem(text: str) -> str | None:
    """`key=value …` that no pipeline takes."""
    words = text.split()
    if (
        text in PLACEHOLDERS
        or not words
        or not all(re.match(r"[a-z_]+(\.\w+)*=\S", word) for word in words)
    ):
        return None
    batch = ["train", "-m"]
    if any(not problems_of([*begin, *words], whole=False) for begin in (*zip(PIPELINES), batch)):
        return None
    return "; ".join(problems_of([*batch, *words], whole=False))


def own_presets(text: str) -> dict[str, str]:
    """File -> content of the YAML blocks whose first line names a file."""
    named = [(re.match(r"# (\S+\.yaml)\n", body), body) for body in blocks(text, {"yaml"})]
    return {name[1]: body for name, body in named if name}


def page_problems(text: str) -> Iterator[str]:
    own = {"=".join(Path(file).with_suffix("").parts[-2:]) for file in own_presets(text)}
    for body in blocks(text, SHELL):
        for line in body.replace("\\\n", " ").splitlines():
            args = arguments(line)
            if args is not None:
                yield from (f"{line}: {p}" for p in problems_of(args, whole=True))
    for code in inline_code(text):
        if code in own:
            continue
        if code.startswith("tl "):
            yield from (f"{code}: {p}" for p in problems_of(arguments(code) or [], whole=False))
        else:
            found = key_problem(code) or assignment_problem(code)
            if found:
                yield f"{code}: {found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_settings_exist(page):
    assert list(page_problems(page.read_text())) == []


def test_wrong_commands_and_settings_are_found():
    text = """
Set `data.rot`, `finetune.phases.head.lr_rtio`, `finetune=lpft`, `seed=-1`; files such as
`data.json` and `model.onnx` are none, and `data.root`, `finetune.phases.<name>.epochs`,
`top_k=2` are right.
Say `tl train finetune=lp_ft` or `tl trian`.

```bash
NAME=1 tl train finetune=lp_ft   # needs data.root
tl train data.root=a b=1 | tail
docker run --rm tl:latest predict bundle=a source=b outptu=c
```
"""
    assert [found.split(": ", 1)[0].strip() for found in page_problems(text)] == [
        "NAME=1 tl train finetune=lp_ft   # needs data.root",
        "tl train data.root=a b=1 | tail",
        "docker run --rm tl:latest predict bundle=a source=b outptu=c",
        "data.rot",
        "finetune.phases.head.lr_rtio",
        "finetune=lpft",
        "seed=-1",
        "tl trian",
    ]


def test_every_pipeline_has_a_command_in_the_readme():
    lines = "".join(blocks(PAGES[0].read_text(), SHELL)).replace("\\\n", " ").splitlines()
    named = {args[0] for line in lines if (args := arguments(line))}
    assert named >= set(PIPELINES) - {"demo"}  # make demo calls that one


def literal(node: ast.expr) -> object:
    """Value of an argument; nothing where it holds a variable, as `values` of `compose` may."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return {}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_compose(page):
    for body in blocks(page.read_text(), {"python"}):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.compose":
                tl.compose(*map(literal, node.args))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_own_presets_of_a_page_compose(page, tmp_path):
    """YAML blocks whose first line names a file are what the commands with --config-dir read."""
    text = page.read_text()
    for name, body in own_presets(text).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body)
    lines = "".join(blocks(text, SHELL)).replace("\\\n", " ").splitlines()
    for line in lines:
        args = arguments(line)
        if args and "--config-dir" in args:
            code = "import sys, tl.pipelines as p; p.main(sys.argv[1:])"
            done = subprocess.run(
                [sys.executable, "-c", code, *args, "--cfg", "job"],
                cwd=tmp_path, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            presets = [a.split("=")[1] for a in args if a.startswith("finetune=")]
            assert all(f"method: {preset}" in done.stdout for preset in presets)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    code = [*"".join(blocks(text, SHELL)).splitlines(), *inline_code(text)]
    named = {line.split()[1] for line in code if re.match(r"make [a-z]", line)}
    assert named <= targets


def test_configuration_page_is_up_to_date():
    page = runpy.run_path(str(REPO / "docs" / "make_configuration.py"))["page"]()
    assert "| `finetune.lr_ratio` | number, ≥ 1, ≤ 100, or null |" in page
    written = (REPO / "docs" / "configuration.md").read_text()
    assert written == page, "the schemas or presets changed: run `make docs`"


def test_configuration_page_names_every_setting_and_preset():
    written = (REPO / "docs" / "configuration.md").read_text()
    open_nodes = {"trainer", "callbacks", "logger"}
    parents = {key.rpartition(".")[0] for key in known_keys()} - open_nodes
    leaves = {key for key in known_keys() if key not in parents} - {"finetune.phases"}
    assert {key for key in leaves if f"| `{key}` |" not in written} == set()
    presets = {f"{f.parent.name}={f.stem}" for f in (REPO / "conf").glob("*/*.yaml")}
    assert {preset for preset in presets if f"| `{preset}` |" not in written} == set()
