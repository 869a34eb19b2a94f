"""Which column of a manifest or data set means what: as the config says, else guessed and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tl.config import ColumnsConfig
from tl.data.errors import DataError
from tl.data.folder import is_image_name, nearest, some

# Names that people give, the likeliest first; case, spaces and hyphens do not count.
GUESSES = {
    "image": (
        *("image", "path", "image_path", "file_name", "filename", "file", "filepath", "file_path"),
        *("img", "img_path", "image_file", "image_name", "image_filename"),
    ),
    "label": (
        *("label", "labels", "class", "classes", "category", "categories", "target", "targets"),
        *("class_name", "label_name", "category_name", "tags", "class_id", "label_id", "y"),
        *("category_id", "fine_label"),
    ),
    "split": ("split", "set", "subset", "partition"),
    "group": (
        *("group", "group_id", "patient", "patient_id", "subject", "subject_id", "product"),
        *("product_id", "video", "video_id", "session", "session_id"),
    ),
    "weight": ("weight", "sample_weight", "weights"),
}
SHOWN = 12
MARKS = {"0", "1", "0.0", "1.0", "true", "false"}


@dataclass
class Columns:
    """Names of the columns.

    Args:
        image: With paths; None where the images themselves are in the table.
        bytes: With images.
        label: With the label, or one a class.
        split: With train, val or test.
        group: With what stays together.
        weight: With weights.
        guessed: Kind -> column, of those that were guessed.
    """

    image: str | None = None
    bytes: str | None = None
    label: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None
    weight: str | None = None
    guessed: dict[str, str] = field(default_factory=dict)

    def needed(self) -> list[str]:
        """All of them but the images themselves."""
        names = (self.image, *self.label, self.split, self.group, self.weight)
        return list(dict.fromkeys(name for name in names if name is not None))

    def note(self, origin: str) -> list[str]:
        """A sentence about what was guessed."""
        if not self.guessed:
            return []
        parts = ", ".join(f"{kind} from column {name}" for kind, name in self.guessed.items())
        return [f"{origin}: {parts} (data.columns says otherwise)"]


def find_columns(
    origin: str,
    sample: pa.Table,
    asked: ColumnsConfig,
    *,
    images: Sequence[str] = (),
) -> Columns:
    """Take the columns that the config names, and guess the others.

    Args:
        origin: Of the table, for messages.
        sample: Its first rows.
        asked: What the config says.
        images: Columns that hold images as bytes.

    Raises:
        DataError: A column that is not there, or cannot be guessed; all such at once.
    """
    names = sample.column_names
    problems = [
        f"{origin}: there are several columns {name}: rename them"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    found = Columns()
    labels = [asked.label] if isinstance(asked.label, str) else list(asked.label or ())
    wanted = {
        **{kind: getattr(asked, kind) for kind in ("image", "bytes", "split", "group", "weight")},
        **{f"label.{i}" if len(labels) > 1 else "label": n for i, n in enumerate(labels)},
    }
    for kind, name in wanted.items():
        if name is not None and name not in names:
            hint = nearest(name, names) or f" (there are: {some(names, SHOWN)})"
            key = kind.partition(".")[0]
            problems.append(f"data.columns.{key}: {origin} has no column {name}{hint}")
    if problems:
        raise DataError(problems)
    for kind in ("image", "bytes", "split", "group", "weight"):
        setattr(found, kind, getattr(asked, kind))
    found.label = tuple(labels)
    problems = _find_images(origin, sample, found, images)
    for kind in ("split", "group", "weight"):
        if getattr(found, kind) is None and (name := _by_name(kind, names, found)):
            setattr(found, kind, name)
            found.guessed[kind] = name
    problems += _find_label(origin, sample, found, images)
    if problems:
        raise DataError(problems)
    return found


def _by_name(kind: str, names: Sequence[str], found: Columns) -> str | None:
    plain = {n.strip().lower().replace(" ", "_").replace("-", "_"): n for n in reversed(names)}
    used = {*found.needed(), found.bytes}
    return next((plain[g] for g in GUESSES[kind] if g in plain and plain[g] not in used), None)


def _find_images(origin: str, sample: pa.Table, found: Columns, images: Sequence[str]) -> list[str]:
    """The column with paths or with images, never both."""
    if found.bytes is not None:
        if found.bytes not in images:
            kind = sample.schema.field(found.bytes).type
            return [
                f"data.columns.bytes: column {found.bytes} of {origin} holds {kind}, not bytes; "
                f"data.columns.image={found.bytes} names a column of paths"
            ]
        return []
    if found.image is not None:
        if found.image in images:
            found.image, found.bytes = None, found.image
        return []
    texts = [f.name for f in sample.schema if _is_text(f.type)]
    by_name = _by_name("image", [n for n in texts if n not in found.label], found)
    if by_name is None:
        by_name = next((name for name in texts if _has_image_names(sample[name])), None)
    if images and by_name is not None and _has_image_names(sample[by_name]):
        return [
            f"{origin} has images (column {images[0]}) and paths (column {by_name}): say which "
            f"counts with data.columns.bytes={images[0]} or data.columns.image={by_name}"
        ]
    if len(images) > 1:
        return [
            f"{origin} has several columns with images ({some(images)}): name one with "
            "data.columns.bytes"
        ]
    if images:
        found.bytes = found.guessed["image"] = images[0]
    elif by_name is not None:
        found.image = found.guessed["image"] = by_name
    else:
        return [
            f"{origin} has no column that looks like paths of images (there are: "
            f"{some(sample.column_names, SHOWN)}): name it with data.columns.image"
        ]
    return []


def _find_label(origin: str, sample: pa.Table, found: Columns, images: Sequence[str]) -> list[str]:
    if found.label:
        return []
    used = {*found.needed(), *images}
    rest = [name for name in sample.column_names if name not in used]
    if name := _by_name("label", rest, found):
        found.label = (name,)
    elif len(rest) == 1 and found.image is not None:
        found.label = (rest[0],)
    elif len(rest) > 1 and all(_has_marks(sample[name]) for name in rest):
        found.label = tuple(rest)
    if not found.label:
        there = some(sample.column_names, SHOWN)
        return [
            f"{origin} has no column that looks like a label (there are: {there}): name it with "
            "data.columns.label"
        ]
    found.guessed["label"] = some(found.label)
    return []


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _has_image_names(column: pa.ChunkedArray) -> bool:
    values = [value for value in column.slice(0, 20).to_pylist() if value]
    return bool(values) and all(is_image_name(str(value).strip()) for value in values)


def _has_marks(column: pa.ChunkedArray) -> bool:
    values = {str(value).strip().lower() for value in column.to_pylist()}
    return bool(values) and values <= MARKS


# --- from columns to arrays -----------------------------------------------------------------------


def text_of(column: Any) -> pa.Array:
    """A column as stripped text; null where there is none."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(array.type):  # 3.0 is how other tools write 3 beside empty cells
        whole = pc.equal(array, pc.round(array)).fill_null(True)
        if pc.all(whole).as_py() and pc.all(pc.less(pc.abs(array), 2.0**53)).as_py() is not False:
            array = array.cast(pa.int64())
    text = pc.utf8_trim_whitespace(array.cast(pa.large_string()))
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)


def labels_of(column: Any, separator: str, *, split: bool) -> pa.Array:
    """A label column as `Listing.labels` wants it: text, integers, numbers, or lists of them.

    Args:
        column: Of a table.
        separator: Between several labels in one cell.
        split: Whether cells with a separator hold several labels.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        plain = pa.int64() if pa.types.is_integer(inner) else pa.large_string()
        return array.cast(pa.list_(plain))
    if pa.types.is_integer(kind):
        return array.cast(pa.int64())
    if pa.types.is_floating(kind):
        return array.cast(pa.float64())
    text = text_of(array)
    if split and pc.any(pc.match_substring(text, separator)).as_py():
        return _lists(text, separator)
    return _numbers_in(text)


def _lists(text: pa.Array, separator: str) -> pa.Array:
    """Lists of the labels in each cell; empty ones between separators do not count."""
    parts = pc.split_pattern(text.fill_null(""), separator)
    flat = pc.utf8_trim_whitespace(parts.flatten())
    owner = np.repeat(np.arange(len(text)), pc.list_value_length(parts).to_numpy())
    kept = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    sizes = np.bincount(owner[kept], minlength=len(text))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, flat.filter(pa.array(kept)))


def _numbers_in(text: pa.Array) -> pa.Array:
    """Integers or floats where all text is one and nothing is lost (`007` stays text)."""
    distinct = pc.unique(text).drop_null()
    if not len(distinct):
        return text
    if pc.all(pc.match_substring_regex(distinct, r"^-?(0|[1-9][0-9]{0,17})$")).as_py():
        return text.cast(pa.int64())
    number = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$|^(nan|NaN|NAN|-?inf)$"
    some_point = pc.any(pc.match_substring_regex(distinct, r"[.eE]|nan|NaN")).as_py()
    if some_point and pc.all(pc.match_substring_regex(distinct, number)).as_py():
        return text.cast(pa.float64())
    return text


def one_hot(
    table: pa.Table, names: Sequence[str], problems: list[str], place: Mapping[str, str]
) -> tuple[pa.Array, NDArray[np.int64]]:
    """Class indices of each row from columns of 0 and 1, as lists, and how many each row has.

    Args:
        table: Of the manifest.
        names: Columns, one a class.
        problems: Sentences about cells that are neither 0 nor 1 are added.
        place: `origin`, and `first`: the number of the first row in messages.
    """
    marks = np.zeros((len(table), len(names)), bool)
    for number, name in enumerate(names):
        text = pc.utf8_lower(text_of(table[name]).cast(pa.large_string())).fill_null("")
        good = pc.is_in(text, value_set=pa.array(sorted(MARKS), text.type))
        bad = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
        if len(bad):
            row = int(bad[0]) + int(place["first"])
            problems.append(
                f"{place['origin']}: column {name} is one of the label columns, but row {row:,} "
                f"has {text[int(bad[0])].as_py()[:40]!r} there: 0 or 1 is expected"
            )
        ones = pa.array(["1", "1.0", "true"], text.type)
        marks[:, number] = pc.is_in(text, value_set=ones).to_numpy(zero_copy_only=False)
    sizes = marks.sum(axis=1)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.nonzero(marks)[1])), sizes


def weights_of(column: Any, describe: Any, problems: list[str]) -> NDArray[np.float32] | None:
    """Weights as numbers of 0 or more.

    Args:
        column: Of a table.
        describe: From the index of a row to its place.
        problems: A sentence about the first row that has no such number is added.
    """
    text = text_of(column)
    try:
        values = text.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        problems.append(f"the weights are not all numbers: {error}")
        return None
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        shown = text[int(bad[0])].as_py()
        problems.append(f"{describe(int(bad[0]))} has the weight {shown}: 0 or more is expected")
        return None
    if not (values > 0).any():
        problems.append("all weights are 0")
    found: NDArray[np.float32] = values.astype(np.float32)
    return found
