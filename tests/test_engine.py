"""Engines: the numbers of eager, any batch, the right choice, and never the end of a job."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn

from tl.config import ConfigError
from tl.engine import BF16_TOLERANCE, choose_engine, onnx, workers_and_threads
from tl.engine.comparing import relative_difference
from tl.engine.folding import fold_batchnorm
from tl.engine.memory import Graph, Memory, machine
from tl.engine.runners import UnavailableError, has_bf16

CPU = torch.device("cpu")
MANY = 1_000_000  # pays for every engine


class Values(nn.Module):
    """What a prefix gives: maps or tokens, and two pooled vectors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        values = self.model.forward_features(images)
        return values, values.transpose(1, -1).flatten(2).mean(2), values.flatten(1)[:, :5]


class WholeNorms(fx.Tracer):
    """As tl.graph traces: timm's norm with an activation stays one module."""

    def is_leaf_module(self, m, qualified):
        return isinstance(m, BatchNormAct2d) or super().is_leaf_module(m, qualified)


def prefix_of(name, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **more).eval()
    for module in model.modules():  # as after training: folding has something to do
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return Values(model).eval()


def traced(module, tracer=None):
    return fx.GraphModule(module, (tracer or fx.Tracer()).trace(module)).eval()


def photos(number, size=64):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def convolutions():
    return traced(prefix_of("test_efficientnet"), WholeNorms())


@pytest.fixture
def no_compiler(monkeypatch):
    """Leaves eager and ONNX Runtime, which need no half minute to set up."""
    monkeypatch.setenv("CXX", "/nowhere/g++")


def expected(prefix, images):
    with torch.no_grad():
        return prefix(images)


def assert_close(outputs, reference, tolerance=1e-4):
    assert all(output.dtype == torch.float32 for output in outputs)
    assert all(output.device == CPU for output in outputs)
    assert relative_difference(outputs, reference) <= tolerance


NETWORKS = {
    "convolutions": ("test_efficientnet", {}),
    "tokens": ("test_vit", {"img_size": 64}),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
        },
    ),
}


@pytest.mark.parametrize("choice", ["eager", "onnxruntime"])
@pytest.mark.parametrize("network", NETWORKS)
def test_an_engine_gives_what_eager_gives_for_any_batch(network, choice):
    name, more = NETWORKS[network]
    prefix = prefix_of(name, **more)
    engine = choose_engine(prefix, photos(6), device=CPU, images_to_run=100, choice=choice)
    assert engine.name == choice
    assert engine.difference <= engine.tolerance == 1e-4
    for number in (1, 3, 6, 17):
        images = photos(number)
        assert_close(engine(images), expected(prefix, images))
    images = photos(5).to(memory_format=torch.channels_last)
    assert_close(engine(images), expected(prefix, images))


def test_a_suffix_can_train_on_the_outputs(convolutions):
    for choice in ("eager", "onnxruntime"):
        engine = choose_engine(convolutions, photos(4), device=CPU, images_to_run=50, choice=choice)
        pooled = engine(photos(4))[1]
        head = nn.Linear(pooled.shape[1], 2)
        head(pooled).sum().backward()
        assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("choice", ["eager", "onnxruntime"])
def test_batches_run_in_order_and_are_read_when_needed(convolutions, choice):
    engine = choose_engine(convolutions, photos(4), device=CPU, images_to_run=50, choice=choice)
    batches = [photos(4), photos(3) * 0.5, photos(1)]
    read = []

    def source():
        for batch in batches:
            read.append(len(batch))
            yield batch

    results = engine.run(source())
    first = next(results)
    assert read == [4]
    for batch, outputs in zip(batches, [first, *results], strict=True):
        assert_close(outputs, expected(convolutions, batch))
    assert list(engine.run([])) == []


class Baked(nn.Module):
    """Control flow on the batch, which a trace bakes in and torch.export refuses."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        values = self.conv(images)
        if float(values.abs().max()) > 1e-3 + float(self.conv.bias.abs().max()):
            values = values + 1  # never for the black images of a trace
        return (values,)


def test_what_a_trace_bakes_in_is_found_and_said(tmp_path):
    prefix, memory = Baked().eval(), tmp_path / "speeds.json"
    kwargs = {"device": CPU, "images_to_run": MANY, "memory": memory}
    engine = choose_engine(prefix, photos(4), choice="onnxruntime", **kwargs)
    assert engine.name == "eager"
    assert_close(engine(photos(9)), expected(prefix, photos(9)))
    assert "onnxruntime left out: differs by" in engine.line()
    assert "onnxruntime by torch.export left out: torch.export gives no ONNX" in engine.line()
    rows = {row["engine"]: row for row in json.loads(memory.read_text())["rows"]}
    assert rows["onnxruntime"]["difference"] > 1e-4


def test_few_images_run_eagerly_and_many_by_the_engine_that_measured_fastest(
    convolutions, tmp_path, no_compiler
):
    memory = tmp_path / "deep" / "speeds.json"
    images = photos(16)
    measured = choose_engine(
        convolutions, images, device=CPU, images_to_run=1, choice="onnxruntime", memory=memory
    )
    row = json.loads(memory.read_text())["rows"][0]
    assert row["engine"] == "onnxruntime"
    assert row["setup"] == pytest.approx(measured.setup_seconds)
    names = {}
    for number in (10, MANY):
        engine = choose_engine(
            convolutions, images, device=CPU, images_to_run=number, memory=memory
        )
        names[number] = engine.name
        assert_close(engine(images), expected(convolutions, images))
    assert names == {10: "eager", MANY: "onnxruntime"}
    line = measured.line()
    assert line.startswith("onnxruntime: ")
    assert " ms an image after " in line
    assert " s of export (eager " in line
    assert ", difference " in line


def test_what_failed_in_an_earlier_job_is_not_tried_again(tmp_path, no_compiler):
    prefix, memory = Baked().eval(), tmp_path / "speeds.json"
    first = choose_engine(
        prefix, photos(4), device=CPU, images_to_run=1, choice="onnxruntime", memory=memory
    )
    assert first.name == "eager"
    engine = choose_engine(prefix, photos(4), device=CPU, images_to_run=MANY, memory=memory)
    assert engine.name == "eager"
    assert "onnxruntime left out, as an earlier job found: differs by" in engine.line()


@pytest.mark.parametrize(
    "content",
    ["", "no json", "[]", '{"version": 1}', '{"version": 1, "rows": [{"engine": 3}]}', None],
)
def test_an_unreadable_memory_costs_a_guess_only(convolutions, tmp_path, content):
    memory = tmp_path / "speeds.json"
    if content is None:
        memory.mkdir()
    else:
        memory.write_text(content)
    kwargs = {"device": CPU, "images_to_run": 10, "memory": memory}
    engine = choose_engine(convolutions, photos(2), **kwargs)
    assert engine.name == "eager"
    if content is not None:
        assert json.loads(memory.read_text())["rows"][0]["engine"] == "eager"
    assert [file.name for file in tmp_path.iterdir()] == ["speeds.json"]


def test_memory_prefers_the_same_network_then_the_most_alike_one(tmp_path):
    place = machine(CPU, 2)
    known = [Graph("a", 100, "convolutions"), Graph("b", 1000, "convolutions")]
    file = tmp_path / "speeds.json"
    for i, graph in enumerate(known):
        memory = Memory(file, place, graph)
        seen = memory.expected("onnxruntime")
        memory.keep({"onnxruntime": type(seen)(setup=1.0 + i, ratio=0.1 * (i + 1))})
    assert Memory(file, place, known[1]).expected("onnxruntime").setup == 2.0
    alike = Memory(file, place, Graph("c", 150, "convolutions")).expected("onnxruntime")
    assert (alike.setup, alike.ratio) == (pytest.approx(1.5), pytest.approx(0.1))
    guess = Memory(None, place, Graph("c", 150, "convolutions")).expected("onnxruntime")
    for other in (
        Memory(file, place + " of another version", known[0]),
        Memory(file, place, Graph("c", 150, "products")),
    ):
        assert other.expected("onnxruntime").ratio != pytest.approx(0.1)
    rows = json.loads(file.read_text())
    for row in rows["rows"]:
        row["time"] -= 8 * 24 * 3600
    file.write_text(json.dumps(rows))
    old = Memory(file, place, Graph("c", 150, "convolutions")).expected("onnxruntime")
    assert old == guess


def test_a_tolerance_of_nothing_gives_the_network_as_it_is(convolutions):
    images = photos(4)
    for choice in ("eager", "onnxruntime"):
        engine = choose_engine(
            convolutions, images, device=CPU, images_to_run=MANY, choice=choice, tolerance=0.0
        )
        assert (engine.name, engine.difference) == ("eager", 0.0)
        assert "and 0 is allowed" in engine.line()
        assert_close(engine(images), expected(convolutions, images), 1e-6)


def test_bf16_when_asked_for_says_its_own_tolerance(convolutions):
    engine = choose_engine(convolutions, photos(4), device=CPU, images_to_run=100, choice="bf16")
    if not has_bf16(CPU):
        assert engine.name == "eager"
        assert "bf16 left out: this cpu has no bf16 arithmetic" in engine.line()
    elif engine.name == "bf16":
        assert 0 < engine.difference <= engine.tolerance == BF16_TOLERANCE
        assert "bf16 may differ by 0.02" in engine.line()
        assert_close(engine(photos(11)), expected(convolutions, photos(11)), 0.05)
    else:
        assert "bf16 left out: differs by" in engine.line()
    assert choose_engine(convolutions, photos(4), device=CPU, images_to_run=100).name != "bf16"


def test_no_compiler_is_a_reason_not_an_error(convolutions, no_compiler):
    engine = choose_engine(convolutions, photos(4), device=CPU, images_to_run=100, choice="compile")
    assert engine.name == "eager"
    assert "compile left out: torch.compile needs a C++ compiler" in engine.line()


def test_an_unknown_engine_is_a_wrong_request(convolutions):
    with pytest.raises(ConfigError, match="'tensorrt': choose one of auto, eager"):
        choose_engine(convolutions, photos(2), device=CPU, images_to_run=1, choice="tensorrt")


def test_a_network_that_cannot_be_copied_runs_as_it_is():
    class Guarded(Baked):
        def __deepcopy__(self, memo):
            raise TypeError("held by a lock")

    prefix = Guarded().eval()
    engine = choose_engine(prefix, photos(3), device=CPU, images_to_run=MANY)
    assert_close(engine(photos(3)), expected(prefix, photos(3)))
    assert "the network cannot be copied: TypeError: held by a lock" in engine.line()


def test_choosing_leaves_network_process_and_screen_as_they_were(capfd, caplog):
    prefix = traced(prefix_of("test_efficientnet"))
    prefix.training = True  # the root's flag alone, as fx sets it
    modes = [module.training for module in prefix.modules()]
    weights = copy.deepcopy(prefix.state_dict())
    levels = {n: logging.getLogger(n).level for n in ("torch", "torch.onnx", "onnxscript")}
    filters, threads = list(warnings.filters), torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        choose_engine(prefix, photos(2), device=CPU, images_to_run=9, choice="onnxruntime")
    assert [module.training for module in prefix.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in prefix.state_dict().items())
    assert all(parameter.requires_grad for parameter in prefix.parameters())
    assert list(warnings.filters) == filters
    assert torch.get_num_threads() == threads
    assert {n: logging.getLogger(n).level for n in levels} == levels
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []


def test_weights_of_an_engine_are_its_own(convolutions):
    prefix = copy.deepcopy(convolutions)
    for choice in ("eager", "onnxruntime"):
        before = expected(prefix, photos(3))
        engine = choose_engine(prefix, photos(3), device=CPU, images_to_run=9, choice=choice)
        with torch.no_grad():
            for parameter in prefix.parameters():
                parameter.mul_(1.5)
        assert_close(engine(photos(3)), before)


def test_threads_may_share_an_engine(convolutions):
    batches = [photos(n) for n in (1, 5, 3, 8)] * 3
    references = [expected(convolutions, batch) for batch in batches]
    choices, filters = ("eager", "onnxruntime"), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        engines = list(
            pool.map(
                lambda c: choose_engine(
                    convolutions, photos(4), device=CPU, images_to_run=9, choice=c
                ),
                choices * 2,
            )
        )
        assert [engine.name for engine in engines] == list(choices * 2)
        assert list(warnings.filters) == filters
        for engine in engines:
            for outputs, reference in zip(pool.map(engine, batches), references, strict=True):
                assert_close(outputs, reference)


def test_threads_of_onnxruntime_are_those_that_were_given(convolutions):
    for given, found in ((3, 3), (None, len(os.sched_getaffinity(0)))):
        engine = choose_engine(
            convolutions,
            photos(2),
            device=CPU,
            images_to_run=9,
            choice="onnxruntime",
            threads=given,
        )
        options = engine.runner.session.get_session_options()
        assert options.intra_op_num_threads == found
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize("exporter", ["tracing", "torch.export"])
def test_a_graph_too_large_for_memory_goes_through_files_that_vanish(
    convolutions, tmp_path, monkeypatch, exporter
):
    monkeypatch.setattr(onnx, "MAX_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    images = photos(4)
    reference = expected(convolutions, images)
    runner = onnx.onnx_runner(
        convolutions, images[:2], reference, traced=exporter == "tracing", threads=1
    )
    assert list(tmp_path.iterdir()) == []
    assert_close(runner(images), reference)


def test_batchnorm_is_folded_wherever_it_alone_reads_a_convolution():
    module = prefix_of("test_efficientnet")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    reference = expected(module, photos(3))
    for tracer in (None, WholeNorms()):
        graph = traced(copy.deepcopy(module), tracer)
        assert fold_batchnorm(graph) == norms > 5
        assert 0 < relative_difference(expected(graph, photos(3)), reference) < 1e-5
        assert not any(node.target is nn.functional.batch_norm for node in graph.graph.nodes)


class Shared(nn.Module):
    """Norms that must stay: another reader, a module called twice, batch statistics."""

    def __init__(self):
        super().__init__()
        self.read, self.twice, self.live = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, images):
        values = self.read(images)
        first = self.norms[0](values) + values
        second = self.norms[1](self.twice(first)) + self.twice(images)
        return (self.norms[2](self.live(second)),)


def test_batchnorm_that_others_share_or_that_learns_is_not_folded():
    module = Shared().eval()
    module.norms[2].train()
    assert fold_batchnorm(traced_as_it_is(module)) == 0
    module.eval()
    graph = traced_as_it_is(module)
    reference = expected(module, photos(2, 8))
    assert fold_batchnorm(graph) == 1
    assert relative_difference(expected(graph, photos(2, 8)), reference) < 1e-5


def traced_as_it_is(module):
    return fx.GraphModule(copy.deepcopy(module), fx.Tracer().trace(module))


def test_differences_are_relative_to_the_largest_value():
    nan, inf = float("nan"), float("inf")

    def difference(value, reference):
        return relative_difference((torch.tensor(value),), (torch.tensor(reference),))

    assert difference([1.0, 4.0], [1.5, 5.0]) == pytest.approx(0.2)
    assert difference([nan, inf, 2.0], [nan, inf, 2.0]) == 0
    assert difference([nan, 2.0], [1.0, 2.0]) == inf
    assert difference([0.0], [0.0]) == 0
    assert difference([1e-9], [0.0]) == inf
    with pytest.raises(UnavailableError, match="gives shapes"):
        relative_difference((torch.zeros(2, 3),), (torch.zeros(2, 4),))


def test_cores_are_shared_by_what_decoding_and_network_need():
    assert workers_and_threads(0.0055, 0.0085, 2) == (1, 2)
    assert workers_and_threads(0.0055, 0.0025, 2) == (2, 1)  # small images: decoding is the work
    assert workers_and_threads(0.0055, 0.2, 16) == (1, 16)
    assert workers_and_threads(0.0055, 0.0, 16) == (16, 1)  # a GPU computes
    assert workers_and_threads(0.0, 0.0, 4) == (2, 3)
    for cores in (1, 2, 3, 8, 64):
        for decode in (0.0, 1e-4, 0.005, 0.1):
            workers, threads = workers_and_threads(decode, 0.01, cores)
            assert 1 <= workers <= cores
            assert 1 <= threads <= cores
            # Neither side is what the other waits for, up to the slack of a tenth of a core.
            ideal = cores / (decode + 0.01)
            assert workers + 0.1 >= min(cores, ideal * decode)
            assert threads >= ideal * 0.01 * 0.999


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_once_for_every_batch(convolutions):
    engine = choose_engine(convolutions, photos(6), device=CPU, images_to_run=100, choice="compile")
    assert engine.name == "compile"
    assert engine.difference <= 1e-4
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number in (1, 6, 13):
        assert_close(engine(photos(number)), expected(convolutions, photos(number)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert torch._inductor.config.freezing is False
    assert " s of compilation" in engine.line()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", ["auto", "eager", "bf16", "onnxruntime"])
def test_on_a_gpu(convolutions, choice):
    device = torch.device("cuda")
    engine = choose_engine(
        convolutions, photos(8), device=device, images_to_run=1000, choice=choice
    )
    batches = [photos(n) for n in (8, 8, 3, 1)]
    for batch, outputs in zip(batches, engine.run(batches), strict=True):
        assert_close(outputs, expected(convolutions, batch), 0.05)
    assert engine.name == ("eager" if choice == "onnxruntime" else engine.name)
