"""Pictures from folders and arrays into one form: (M, channels, height, width) uint8, all of one size.

Knows nothing of learners.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.data.tasks import Examples

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
GREY, COLOUR = 28, 84  # sides that the field uses: Omniglot's, miniImageNet's


def as_images(x: np.ndarray, size: int | None = None) -> np.ndarray:
    """From (M, H, W), (M, H, W, channels) or (M, channels, H, W) of any number type.

    Floats up to 1 and booleans are stretched to 0..255.  Larger pictures are made smaller to `size` (default: 28 for
    grey, 84 for coloured).  Raises InputError for other shapes and for numbers outside 0..255.
    """
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"images of shape {x.shape[1:]}; wanted height x width, with 1 or 3 channels before or after")
    if x.dtype != np.uint8:
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
            raise InputError(f"images hold numbers from {low:g} to {high:g}; wanted 0 to 1, or 0 to 255")
        x = np.round(x.astype(np.float32) * (255 if high <= 1 else 1)).astype(np.uint8)
    return _smaller(x, size or (GREY if x.shape[1] == 1 else COLOUR))


def _smaller(x: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    if max(x.shape[2:]) <= size:
        return np.ascontiguousarray(x)
    made = [_resized(Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0)), size) for one in x]
    return np.stack(made)


def _resized(image: Any, size: int) -> np.ndarray:
    """(channels, size, size): the middle square, averaged down."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_folder(root: Path, parts: Mapping[str, Sequence[str]], size: int | None = None) -> dict[str, Examples]:
    """{part: Examples} of a folder of images; a class is named by the folders between the part's and the image.

    Without folders for the parts: lists of classes (``train.txt``, one a line) or of files (``train.csv`` with the
    columns filename and label, files in ``images/``); without those, everything under "train".
    """
    folders = {
        part: next((root / name for name in names if (root / name).is_dir()), None) for part, names in parts.items()
    }
    if folders.get("train") and folders.get("test"):
        files = {part: _by_folder(folder) for part, folder in folders.items() if folder is not None}
    elif (root / "train.csv").is_file() and (root / "test.csv").is_file():
        files = {part: found for part, names in parts.items() if (found := _by_list(root, names))}
    else:
        files = _by_names(root, _by_folder(root), parts)
    grey = _all_grey([file for found in files.values() for file, _ in found])
    return {part: _load(found, grey, size) for part, found in files.items()}


def _by_folder(folder: Path) -> list[tuple[Path, str]]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: no image in it (known: {', '.join(SUFFIXES)})")
    return [(file, "/".join(file.relative_to(folder).parts[:-1]) or ".") for file in files]


def _by_list(root: Path, names: Sequence[str]) -> list[tuple[Path, str]]:
    path = next((root / f"{name}.csv" for name in names if (root / f"{name}.csv").is_file()), None)
    if path is None:
        return []
    found = []
    with path.open(newline="", encoding="utf-8") as handle:
        for number, row in enumerate(csv.DictReader(handle), 2):
            if not row.get("filename") or not row.get("label"):
                raise InputError(f"{path}:{number}: wanted the columns filename and label")
            file = next((f for f in (root / "images" / row["filename"], root / row["filename"]) if f.is_file()), None)
            if file is None:
                raise InputError(f"{path}:{number}: no such image: {row['filename']}")
            found.append((file, row["label"]))
    return found


def _by_names(
    root: Path, files: list[tuple[Path, str]], parts: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[Path, str]]]:
    lists = {}
    for part, names in parts.items():
        path = next((root / f"{name}.txt" for name in names if (root / f"{name}.txt").is_file()), None)
        if path is not None:
            lists[part] = {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    if not {"train", "test"} <= set(lists):
        return {"train": files}
    return {part: [(file, name) for file, name in files if name in wanted] for part, wanted in lists.items()}


def _all_grey(files: list[Path]) -> bool:
    """Whether none of some 50 of the images is coloured."""
    from PIL import Image

    for file in files[:: max(1, len(files) // 50)]:
        with Image.open(file) as image:
            if image.mode not in ("1", "L", "I", "I;16", "LA"):
                pixels = np.asarray(image.convert("RGB"))
                if (pixels != pixels[..., :1]).any():
                    return False
    return True


def _load(files: list[tuple[Path, str]], grey: bool, size: int | None) -> Examples:
    from PIL import Image, UnidentifiedImageError

    side = size or (GREY if grey else COLOUR)
    pictures = []
    for file, _ in files:
        try:
            with Image.open(file) as image:
                picture = image.convert("L" if grey else "RGB")
                exact = picture.width == picture.height and picture.width <= side and size is None
                pixels = np.asarray(picture)
                pictures.append(
                    (pixels[None] if grey else pixels.transpose(2, 0, 1)) if exact else _resized(picture, side)
                )
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{file}: not a readable image ({str(error).splitlines()[0]})") from None
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        two = " and ".join(map(str, sorted(shapes)[:2]))
        raise InputError(f"images of different sizes, such as {two}: give a size")
    return Examples.of(np.stack(pictures), [name for _, name in files])
