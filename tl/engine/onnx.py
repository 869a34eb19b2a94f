"""The network as an ONNX graph in memory, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from tl.engine.runners import Outputs, Runner, UnavailableError, first_line
from tl.quiet import quiet

# Protocol buffers end at 2 GB; the rest of the graph is small.
MAX_IN_MEMORY = 1_900_000_000


class OnnxRunner(Runner):
    """A session over a graph that takes `images` and gives one tensor per output.

    Args:
        session: Of ONNX Runtime.
        shapes: Of one image's row of each output.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.session = session
        self.names = [output.name for output in session.get_outputs()]
        self.shapes = shapes

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs of `images` (N, 3, H, W); written where torch reads them, without a copy."""
        images = images.detach().to("cpu", torch.float32).contiguous()
        outputs = tuple(torch.empty(len(images), *shape) for shape in self.shapes)
        binding = self.session.io_binding()
        kind = np.float32
        binding.bind_input("images", "cpu", 0, kind, list(images.shape), images.data_ptr())
        for name, output in zip(self.names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, kind, list(output.shape), output.data_ptr())
        self.session.run_with_iobinding(binding)
        return outputs


def onnx_runner(
    base: nn.Module, example: Tensor, outputs: Outputs, *, traced: bool, threads: int
) -> OnnxRunner:
    """Export and load.

    Args:
        base: On the CPU, in eval mode, with weights of its own.
        example: Two images or more.
        outputs: What `base` gives for some images; their shapes count.
        traced: Record one run (half a second), instead of `torch.export` (ten).
        threads: That ONNX Runtime computes with.

    Raises:
        UnavailableError: The network has no such form.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Threads that wait would take the cores from the workers that decode the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    size = sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="tl-engine-") as folder:
            place = Path(folder, "prefix.onnx") if size > MAX_IN_MEMORY else io.BytesIO()
            _export(base, example, place, len(outputs), traced)
            model = str(place) if isinstance(place, Path) else place.getvalue()
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # both have dozens of ways to refuse a graph
        how = "tracing" if traced else "torch.export"
        raise UnavailableError(f"{how} gives no ONNX graph: {first_line(error)}") from error
    return OnnxRunner(session, [tuple(output.shape[1:]) for output in outputs])


def _export(
    base: nn.Module, example: Tensor, place: Path | io.BytesIO, outputs: int, traced: bool
) -> None:
    names = [f"value{i}" for i in range(outputs)]
    more: dict[str, Any] = {"input_names": ["images"], "output_names": names, "verbose": False}
    with torch.no_grad():
        if traced:
            axes = {name: {0: "batch"} for name in ("images", *names)}
            file: Any = place  # tracing writes to streams too; its annotation does not say so
            torch.onnx.export(base, (example,), file, dynamo=False, dynamic_axes=axes, **more)
            return
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.onnx.export(base, (example,), dynamo=True, dynamic_shapes=shapes, **more)
        assert program is not None
        if isinstance(place, Path):
            program.save(place, external_data=True)
        else:
            place.write(program.model_proto.SerializeToString())
