"""A bundle as an object: files or pictures in, class probabilities or numbers out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .images import ImageError, open_image, to_rgb, upright
from .outputs import Outputs
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Images(Protocol):
    """Images that are read when their turn comes, such as those of a table."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, for errors and tables."""

    def source(self, index: int) -> Any:
        """A path, or the contents of a file."""


class BundleError(Exception):
    """The bundle, or what was asked of it, is wrong; the text says what and how to mend it."""

    exit_code = 2


class Bundle:
    """A trained model that was read from its folder; make one with `Bundle.load`.

    Attributes:
        path: The folder.
        classes: Names in the order of the network's outputs; for a number that of the target.
        preprocessing: From a file's pixels to the network's input.
        outputs: What the outputs mean; its `task` is single, multi or regression.
    """

    def __init__(
        self,
        path: Path,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        session: Any,
        threads: int,
        outputs: Outputs | None = None,
    ) -> None:
        self.path = path
        self.classes = classes
        self.preprocessing = preprocessing
        self.outputs = outputs or Outputs()
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
        preprocessing = _read(folder / "preprocessing.json", Preprocessing.from_dict)
        outputs = Outputs()
        if (folder / "bundle.json").is_file():  # without it: one class an image
            outputs = _read(folder / "bundle.json", lambda v: Outputs.from_dict(v, classes))
        threads = threads or _cores()
        session = _session(folder / "model.onnx", threads)
        _check_fit(folder, session, classes, preprocessing, outputs)
        return cls(folder, classes, preprocessing, session, threads, outputs)

    @property
    def task(self) -> str:
        """What the model predicts: `single`, `multi` or `regression`."""
        return self.outputs.task

    def probabilities(
        self,
        sources: Sequence[Any] | Images,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Class probabilities, (N, classes), in [0, 1]; the sum of a row is 1 with one class each.

        Args:
            sources: Paths, file contents, PIL images, or uint8 arrays of (height, width, 3); or
                anything with a length, `source(i)` and `name(i)`, such as the images of a table.
            batch_size: Images per call of the network.
            progress: Called with (done, total) after every batch.

        Raises:
            ImageError: The first source that cannot be used.
            BundleError: The model predicts a number: see `values`.
        """
        if self.task == "regression":
            raise BundleError(f"{self.path} predicts a number ({self.classes[0]}): use values()")
        return self.answers(sources, batch_size, progress)

    def values(
        self,
        sources: Sequence[Any] | Images,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Predicted numbers, (N,), in units of the target; arguments as for `probabilities`.

        Raises:
            ImageError: The first source that cannot be used.
            BundleError: The model predicts classes: see `probabilities`.
        """
        if self.task != "regression":
            raise BundleError(f"{self.path} predicts classes: use probabilities()")
        return self.answers(sources, batch_size, progress)[:, 0]

    def answers(
        self,
        sources: Sequence[Any] | Images,
        batch_size: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[Any]:
        """Probabilities (N, classes) or numbers (N, 1), as the task is; see `probabilities`."""
        found, sources = [], listed(sources)
        for values, _ in self._run(sources, batch_size, skip_bad=False):
            found.append(values)
            if progress is not None:
                progress(sum(map(len, found)), len(sources))
        empty = np.empty((0, len(self.classes)), np.float32)
        return np.concatenate(found) if found else self.outputs.answers(empty)

    def predict(
        self,
        sources: Sequence[Any] | Images,
        *,
        batch_size: int = 32,
        top_k: int = 3,
        skip_bad: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> pd.DataFrame:
        """What the model says of each source, in the order given.

        Args:
            sources: As in `probabilities`.
            batch_size: Images per call of the network.
            top_k: Classes to name in column `top`.
            skip_bad: A source that cannot be used gets its reason in column `error` and no label.
            progress: Called with (done, total) after every batch.

        Returns:
            Columns source, then label, score (probability of the label), sure (whether the score
            is at or above the bundle's threshold; only where it has one), top (list of [class,
            probability], best first), and error (None where all went well). With several labels an
            image: labels and scores (lists of the classes above their thresholds, best first) in
            place of label and score. With a number: value alone.

        Raises:
            ImageError: The first source that cannot be used, without `skip_bad`.
        """
        import pandas as pd

        sources = listed(sources)
        names = [_source_name(sources, i) for i in range(len(sources))]
        rows: list[dict[str, Any]] = []
        for values, errors in self._run(sources, batch_size, skip_bad=skip_bad):
            for row, error in zip(values, errors, strict=True):
                if error is not None:
                    rows.append({**self.outputs.columns, "error": error.reason})
                else:
                    found = self.outputs.row(row, self.classes, top_k)
                    rows.append({**found, "error": None})
            if progress is not None:
                progress(len(rows), len(names))
        # As objects: pandas would turn None in a column of texts into NaN.
        columns = {"source": pd.Series(names, dtype=object)}
        for name in [*self.outputs.columns, "error"]:
            kind = {"score": float, "value": float, "sure": bool}.get(name, object)
            columns[name] = pd.Series([row[name] for row in rows], dtype=kind)
        return pd.DataFrame(columns)

    def verify(self, tolerance: float | None = None) -> float:
        """Predict the golden images again.

        Args:
            tolerance: Largest difference of a probability, or of a number in units of its standard
                deviation in training; default: that of the export.

        Returns:
            The largest difference from what PyTorch gave at the export.

        Raises:
            BundleError: A golden file is missing, or a difference is above the tolerance.
        """
        golden = self.path / "golden"
        try:
            record = json.loads((golden / "expected.json").read_text(encoding="utf-8"))
            expected = {name: np.array(row, np.float64) for name, row in record["images"].items()}
            if not expected:
                raise BundleError(f"{golden / 'expected.json'} names no images")
            tolerance = float(record["tolerance"]) if tolerance is None else tolerance
            found = self.answers([golden / name for name in expected])
            apart = self.outputs.difference(found, np.stack(list(expected.values())))
            differences = dict(zip(expected, apart.tolist(), strict=True))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImageError) as error:
            raise BundleError(f"{golden} cannot be replayed: {error}") from error
        # NaN is the worst difference of all, and max() alone would lose it.
        worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
        if not differences[worst] <= tolerance:
            raise BundleError(
                f"{self.path}: {self.outputs.names[1]} of golden/{worst} differ by "
                f"{differences[worst]:.2g} from those at the export (tolerance {tolerance:g}): its "
                "files do not belong together, or this machine computes differently; export it "
                "again"
            )
        return float(differences[worst])

    def _run(
        self, sources: Sequence[Any] | Images, batch_size: int, *, skip_bad: bool
    ) -> Iterator[tuple[NDArray[Any], list[ImageError | None]]]:
        """Answers (NaN where an image is bad) and errors, batch by batch."""
        sources = listed(sources)
        width = len(self.classes)
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(sources), batch_size):
                items = [
                    (_source_name(sources, i), _source(sources, i))
                    for i in range(start, min(start + batch_size, len(sources)))
                ]
                decoded = list(pool.map(self._input, items))
                errors = [d if isinstance(d, ImageError) else None for d in decoded]
                for error in errors:
                    if error is not None and not skip_bad:
                        raise error
                good = [i for i, error in enumerate(errors) if error is None]
                used = np.full((len(decoded), width), np.nan, np.float32)
                if good:
                    images = np.stack([d for d in decoded if not isinstance(d, ImageError)])
                    used[good] = self._session.run([self.outputs.used], {"images": images})[0]
                yield self.outputs.answers(used), errors

    def _input(self, item: tuple[str, Any]) -> NDArray[np.float32] | ImageError:
        name, source = item
        try:
            return self.preprocessing(_picture(source))
        except ImageError as error:
            return ImageError(name, error.reason)


def listed(sources: Any) -> Sequence[Any]:
    """A lone path, file or picture counts as a list of one."""
    lone = isinstance(sources, (str, bytes, os.PathLike, Image.Image))
    if lone or (isinstance(sources, np.ndarray) and sources.ndim == 3):
        return [sources]
    return sources  # type: ignore[no-any-return]


def _source(sources: Any, index: int) -> Any:
    """A source of a sequence; one that cannot be read is the error of its image."""
    if not hasattr(sources, "source"):
        return sources[index]
    try:
        return sources.source(index)
    except OSError as error:
        return ImageError(sources.name(index), (error.strerror or str(error)).lower())


def _source_name(sources: Any, index: int) -> str:
    if hasattr(sources, "source"):
        return str(sources.name(index))
    source = sources[index]
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"image {index}"


def _picture(source: Any) -> Image.Image:
    if isinstance(source, ImageError):
        raise source
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


def _read(path: Path, reader: Callable[[dict[str, Any]], T]) -> T:
    """Content of a JSON file of the bundle."""
    try:
        return reader(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise BundleError(f"{path}: {error}") from error


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


def _check_fit(
    folder: Path, session: Any, classes: Sequence[str], spec: Preprocessing, outputs: Outputs
) -> None:
    inputs = {node.name: node.shape for node in session.get_inputs()}
    there = {node.name: node.shape for node in session.get_outputs()}
    if set(inputs) != {"images"} or outputs.used not in there:
        names = f"{sorted(inputs)} and {sorted(there)}"
        wanted = outputs.names[1]
        raise BundleError(f"{folder / 'model.onnx'} must map images to {wanted}, has {names}")
    size = tuple(inputs["images"][1:])
    if size != tuple(spec.input_size):
        wanted = f"preprocessing.json makes {spec.input_size}"
        raise BundleError(f"{folder}: model.onnx takes images of {size}, {wanted}")
    if there[outputs.used][-1] != len(classes) or len(set(classes)) != len(classes):
        found = f"classes.txt has {len(set(classes))} different names in {len(classes)} lines"
        count = there[outputs.used][-1]
        raise BundleError(f"{folder}: model.onnx knows {count} classes, {found}")
