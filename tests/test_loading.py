"""Imports and the garbage collector: off while modules load, as found afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tl.pipelines import loading


@pytest.mark.parametrize("enabled", [True, False])
def test_a_library_leaves_the_collector_as_it_was(enabled):
    frozen = gc.get_freeze_count()
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ModuleNotFoundError), loading():
            import no_such_module  # noqa: F401
        with loading():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen


def test_a_command_does_not_load_what_only_adapters_need(tmp_path):
    script = """
import sys
from tl.pipelines import loading, main
sys.argv = ["tl", "--version"]
main()
with loading():
    from tl import data, display, export, finetuning, models, runs, tracking, training
print(sorted({"peft", "transformers", "accelerate"} & {name.split(".")[0] for name in sys.modules}))
from peft import LoraConfig
print("transformers.utils" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[1:] == ["[]", "True"]


def test_a_command_keeps_the_collector_off_what_it_imported():
    script = """
import gc, sys
from tl.pipelines import loading, main
sys.argv = ["tl", "--version"]
main()
with loading():
    found = [[] for _ in range(1000)]
kept = gc.get_freeze_count()
with loading():
    more = [[] for _ in range(1000)]
print(kept > 1000, gc.get_freeze_count() == kept, gc.isenabled())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == ["True True True"]
