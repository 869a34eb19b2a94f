"""A bundle as an object: files or pictures in, class probabilities out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .images import ImageError, open_image, to_rgb, upright
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    import pandas as pd


class BundleError(Exception):
    """The bundle, or what was asked of it, is wrong; the text says what and how to mend it."""

    exit_code = 2


class Bundle:
    """A trained classifier that was read from its folder; make one with `Bundle.load`.

    Attributes:
        path: The folder.
        classes: Names in the order of the network's outputs.
        preprocessing: From a file's pixels to the network's input.
    """

    def __init__(
        self,
        path: Path,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        session: Any,
        threads: int,
    ) -> None:
        self.path = path
        self.classes = classes
        self.preprocessing = preprocessing
        self._session = session
        self._threads = threads

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Bundle:
        """Read a bundle.

        Args:
            path: Folder that `tl train` or `tl export` wrote.
            threads: For decoding and for the network; default: the cores that this process may use.

        Raises:
            BundleError: A file is missing, damaged, or does not fit the others.
        """
        folder = Path(path)
        needed = ("model.onnx", "classes.txt", "preprocessing.json")
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            inner = f"; did you mean {folder / 'bundle'}?" if (folder / "bundle").is_dir() else ""
            what = f"lacks {', '.join(missing)}" if folder.is_dir() else "no such folder"
            raise BundleError(f"{folder} is no bundle: {what}{inner}")
        names = (folder / "classes.txt").read_text(encoding="utf-8")
        classes = tuple(names.removesuffix("\n").split("\n"))
        try:
            values = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
            preprocessing = Preprocessing.from_dict(values)
        except ValueError as error:
            raise BundleError(f"{folder / 'preprocessing.json'}: {error}") from error
        threads = threads or _cores()
        session = _session(folder / "model.onnx", threads)
        _check_fit(folder, session, classes, preprocessing)
        return cls(folder, classes, preprocessing, session, threads)

    def probabilities(
        self,
        sources: Sequence[Any],
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Class probabilities, (N, classes), each row in [0, 1] with sum 1.

        Args:
            sources: Paths, file contents, PIL images, or uint8 arrays of (height, width, 3).
            batch_size: Images per call of the network.
            progress: Called with (done, total) after every batch.

        Raises:
            ImageError: The first source that cannot be used.
        """
        found = []
        for values, _ in self._run(sources, batch_size, skip_bad=False):
            found.append(values)
            if progress is not None:
                progress(sum(map(len, found)), len(listed(sources)))
        return np.concatenate(found) if found else np.empty((0, len(self.classes)), np.float32)

    def predict(
        self,
        sources: Sequence[Any],
        *,
        batch_size: int = 32,
        top_k: int = 3,
        skip_bad: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> pd.DataFrame:
        """Best classes of each source, in the order given.

        Args:
            sources: As in `probabilities`.
            batch_size: Images per call of the network.
            top_k: Classes to name in column `top`.
            skip_bad: A source that cannot be used gets its reason in column `error` and no label.
            progress: Called with (done, total) after every batch.

        Returns:
            Columns source, label, score (probability of the label), top (list of [class,
            probability], best first) and error (None where all went well).

        Raises:
            ImageError: The first source that cannot be used, without `skip_bad`.
        """
        import pandas as pd

        names = [_source_name(source, i) for i, source in enumerate(listed(sources))]
        rows: list[tuple[str | None, float | None, list[list[Any]], str | None]] = []
        for values, errors in self._run(sources, batch_size, skip_bad=skip_bad):
            for row, error in zip(values.astype(float), errors, strict=True):
                if error is not None:
                    rows.append((None, None, [], error.reason))
                    continue
                best = np.argsort(-row, kind="stable")[:top_k]
                top = [[self.classes[i], float(row[i])] for i in best]
                rows.append((top[0][0], top[0][1], top, None))
            if progress is not None:
                progress(len(rows), len(names))
        table = pd.DataFrame(rows, columns=["label", "score", "top", "error"])
        table["score"] = table["score"].astype(float)
        table.insert(0, "source", pd.Series(names, dtype=object))
        return table

    def verify(self, tolerance: float | None = None) -> float:
        """Predict the golden images again.

        Args:
            tolerance: Largest difference of a probability; default: that of the export.

        Returns:
            The largest difference from the probabilities that PyTorch gave at the export.

        Raises:
            BundleError: A golden file is missing, or a difference is above the tolerance.
        """
        golden = self.path / "golden"
        try:
            record = json.loads((golden / "expected.json").read_text(encoding="utf-8"))
            expected = {name: np.array(row, np.float64) for name, row in record["images"].items()}
            tolerance = float(record["tolerance"]) if tolerance is None else tolerance
            found = self.probabilities([golden / name for name in expected])
            differences = {
                name: float(np.abs(row - expected[name]).max())
                for name, row in zip(expected, found, strict=True)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImageError) as error:
            raise BundleError(f"{golden} cannot be replayed: {error}") from error
        if not differences:
            raise BundleError(f"{golden / 'expected.json'} names no images")
        # NaN is the worst difference of all, and max() alone would lose it.
        worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
        if not differences[worst] <= tolerance:
            raise BundleError(
                f"{self.path}: probabilities of golden/{worst} differ by {differences[worst]:.2g} "
                f"from those at the export (tolerance {tolerance:g}): its files do not belong "
                "together, or this machine computes differently; export it again"
            )
        return differences[worst]

    def _run(
        self, sources: Sequence[Any], batch_size: int, *, skip_bad: bool
    ) -> Iterator[tuple[NDArray[np.float32], list[ImageError | None]]]:
        """Probabilities (NaN where an image is bad) and errors, batch by batch."""
        items = list(enumerate(listed(sources)))
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(items), batch_size):
                decoded = list(pool.map(self._input, items[start : start + batch_size]))
                errors = [d if isinstance(d, ImageError) else None for d in decoded]
                for error in errors:
                    if error is not None and not skip_bad:
                        raise error
                good = [i for i, error in enumerate(errors) if error is None]
                values = np.full((len(decoded), len(self.classes)), np.nan, np.float32)
                if good:
                    images = np.stack([d for d in decoded if not isinstance(d, ImageError)])
                    values[good] = self._session.run(["probabilities"], {"images": images})[0]
                yield values, errors

    def _input(self, item: tuple[int, Any]) -> NDArray[np.float32] | ImageError:
        index, source = item
        try:
            return self.preprocessing(_picture(source))
        except ImageError as error:
            return ImageError(_source_name(source, index), error.reason)


def listed(sources: Any) -> Sequence[Any]:
    """A lone path, file or picture counts as a list of one."""
    lone = isinstance(sources, (str, bytes, os.PathLike, Image.Image))
    if lone or (isinstance(sources, np.ndarray) and sources.ndim == 3):
        return [sources]
    return sources  # type: ignore[no-any-return]


def _source_name(source: Any, index: int) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"image {index}"


def _picture(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(upright(source), "image")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            wanted = "an array must be uint8 of (height, width, 3)"
            raise ImageError("image", f"{wanted}, got {source.dtype} of {source.shape}")
        return Image.fromarray(source)
    if isinstance(source, (str, os.PathLike, bytes)):
        return open_image(source)
    raise ImageError("image", f"a path, bytes, picture or array is wanted, got {type(source)}")


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError("onnxruntime is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every kind of failure
        raise BundleError(f"{path} cannot be read: {error}") from error


def _check_fit(folder: Path, session: Any, classes: Sequence[str], spec: Preprocessing) -> None:
    inputs = {node.name: node.shape for node in session.get_inputs()}
    outputs = {node.name: node.shape for node in session.get_outputs()}
    if set(inputs) != {"images"} or "probabilities" not in outputs:
        names = f"{sorted(inputs)} and {sorted(outputs)}"
        raise BundleError(f"{folder / 'model.onnx'} must map images to probabilities, has {names}")
    size = tuple(inputs["images"][1:])
    if size != tuple(spec.input_size):
        wanted = f"preprocessing.json makes {spec.input_size}"
        raise BundleError(f"{folder}: model.onnx takes images of {size}, {wanted}")
    if outputs["probabilities"][-1] != len(classes) or len(set(classes)) != len(classes):
        found = f"classes.txt has {len(set(classes))} different names in {len(classes)} lines"
        count = outputs["probabilities"][-1]
        raise BundleError(f"{folder}: model.onnx knows {count} classes, {found}")
