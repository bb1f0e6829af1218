"""The data sets as tensors: each split is a uint8 tensor of images (N, C, H, W) and an int64 tensor of labels (N,).

A compute node often has no internet. Download and check the data beforehand, on a machine that has:

    python data.py mnist cifar10 --data_dir data

imagefolder is any folder with the layout {train,test or val}/CLASS/IMAGE, npz any file with arrays of images and
labels. To add a data set, add an entry to DATASETS.
"""

import hashlib
import math
import operator
import os
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from flags import IMPLIED, OneLineParser, number

DEFAULT_IMAGE_SIZE = 128
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # those of IMG_EXTENSIONS; EPS would start Ghostscript
MNIST_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
IMAGENETTE_COUNTS = {"train": 9469, "val": 3925}
DOWNLOAD_TIMEOUT = 15  # seconds without an answer; a firewall that drops packets would hold a run for minutes
LARGEST_MODULUS = 500  # its pairs take 250 MB
SUBSET, LABEL_NOISE, SPLIT = range(3)  # what a random generator is for; it is seeded by (seed, purpose)
NPZ_NAMES = (("x_train", "y_train", "x_test", "y_test"),
             ("train_images", "train_labels", "test_images", "test_labels"))  # the second are MedMNIST's
Tensors = tuple  # x_train, y_train, x_test, y_test and the number of classes, as in Dataset


@dataclass
class Dataset:
    """x_*: uint8 (N, C, H, W); y_*: int64 (N,); mean, std: one float for each channel, in pixel units of [0, 1]."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Source:
    """How to get a data set: an entry of DATASETS."""

    read: Callable[..., Tensors]  # called with name, data_dir and the options
    statistics: tuple = ()  # mean and std of the whole training split; if empty, they are computed
    archives: str = ""  # without internet, put these into data_dir/folder: torchvision takes them for its download
    folder: str = ""
    options: tuple[str, ...] = ()  # which of image_size, modulus, train_fraction, seed it depends on
    package: str = ""  # what it is part of, if it needs no data_dir
    is_file: bool = False  # whether data_dir is a file
    mirror: bool = False  # whether a mirrored image is of the same class, which nobody knows of a user's own


def load_dataset(name: str, data_dir: str | Path = "data", train_size: int | str | None = None, seed: int = 42,
                 image_size: int | None = None, label_noise: float = 0.0, *, modulus: int | None = None,
                 train_fraction: float | None = None) -> Dataset:
    """Return a Dataset on the CPU; download it into data_dir if it is missing and can be downloaded.

    name: a key of DATASETS. data_dir: for imagefolder the folder that holds train/ and test/ (or val/), for npz the
    file. train_size: number of training images, or "all" (default: 1,000 for digits and the sets like MNIST, if they
    have as many; all for the others). For one seed a smaller draw is part of a larger one; the test set is always
    whole. image_size: side in pixels, for imagenette (default 128) and imagefolder: the shorter side is resized to it
    and the centre cut out. By default an imagefolder whose images all have one size keeps it, any other gets 128. An
    imagefolder without colour has one channel. label_noise: fraction of the selected training labels to replace by
    uniformly random ones (one in num_classes is right by chance). modulus, train_fraction: for modular_*, the p of
    (a + b) mod p (default 97) and the fraction of the p * p pairs to train on (default 0.5).

    The decoded images of a folder are cached in it, as decoded-SIZE.npz, if it can be written. The cache trusts
    everyone who can write to that folder.

    Raises ValueError for an unknown name, an option out of range or damaged files, and OSError if data are missing,
    unreadable or cannot be downloaded.
    """
    if isinstance(train_size, int) and train_size < 1:
        raise ValueError(f"train_size must be at least 1, not {train_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if not 0 <= label_noise <= 1:  # also refuses NaN
        raise ValueError(f"label_noise is a fraction between 0 and 1, not {label_noise}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, not {image_size}")

    dataset = read_dataset(name, data_dir, seed=seed, image_size=image_size, modulus=modulus,
                           train_fraction=train_fraction)
    available = len(dataset.x_train)
    implied = IMPLIED["train_size"].get(name, "all")  # 1,000 in the paper
    if train_size is None and implied != "all":
        train_size = min(implied, available)
    count = available if train_size in (None, "all") else int(train_size)
    if count > available:
        raise ValueError(f"train_size {count} is more than the {available} training images of {name}")
    if count < available:
        chosen = torch.from_numpy(np.random.default_rng((seed, SUBSET)).permutation(available)[:count])
        dataset.x_train, dataset.y_train = dataset.x_train[chosen], dataset.y_train[chosen]
    if label_noise > 0:
        rng = np.random.default_rng((seed, LABEL_NOISE))
        replaced = rng.permutation(count)[:round(label_noise * count)]
        dataset.y_train[replaced] = torch.from_numpy(rng.integers(dataset.num_classes, size=len(replaced)))
    return dataset


def from_config(config: Mapping[str, Any], data_dir: str | None = None) -> Dataset:
    """Return the data set that a run's config describes, from its own data_dir or another. Errors: load_dataset's."""
    return load_dataset(config["dataset"], data_dir or config["data_dir"], config["train_size"], config["seed"],
                        config["image_size"], config["label_noise"], modulus=config.get("modulus"),
                        train_fraction=config.get("train_fraction"))


def draw_shifts(seed: int, n: int, image_shape: Sequence[int], mirror: bool) -> torch.Tensor:
    """Return (n, 3): for each of n images its shift down and right in pixels, and whether it is mirrored, as half of
    them are if mirror is true."""
    generator = torch.Generator().manual_seed(seed)
    _channels, height, width = image_shape
    columns = [torch.randint(-(size // 8), size // 8 + 1, (n,), generator=generator) for size in (height, width)]
    mirrored = torch.randint(2, (n,), generator=generator) if mirror else torch.zeros(n, dtype=torch.int64)
    return torch.stack([*columns, mirrored], dim=1)


def augmented(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (N, C, H, W) shifted and mirrored by `shifts` (N, 3); what moves in is black."""
    height, width = images.shape[2:]
    down, right, mirrored = shifts.unbind(1)
    rows = torch.arange(height, device=images.device) - down[:, None]
    columns = torch.arange(width, device=images.device) - right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(mirrored[:, None] > 0, width - 1 - columns, columns).clamp(0, width - 1)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[n, :, rows.clamp(0, height - 1)[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return moved.movedim(3, 1) * inside[:, None]


def source_of(name: str) -> Source:
    """Return the entry of DATASETS; ValueError if there is none."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def read_dataset(name: str, data_dir: str | Path, **options: Any) -> Dataset:
    """Return the whole data set, without a subset or label noise. options: all that a Source may depend on."""
    source = source_of(name)
    for option, value in options.items():
        if value is not None and option not in (*source.options, "seed"):
            takers = " and ".join(other for other in DATASETS if option in DATASETS[other].options)
            raise ValueError(f"{option} is for {takers} only, not for {name}")
    path = os.path.expanduser(data_dir)
    if not (source.package or source.is_file) and os.path.lexists(path):  # also if it is a dangling link
        if not os.path.isdir(path):
            raise NotADirectoryError(f"{path} is not a directory: give the data directory with --data_dir")
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(f"no permission to read {path}: change its mode or give another --data_dir")
    given = {option: options[option] for option in source.options if options[option] is not None}
    x_train, y_train, x_test, y_test, num_classes = source.read(name, path, **given)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"the training images of {name} are {shape_text(x_train)} and its test images "
                         f"{shape_text(x_test)}: files of two data sets are mixed in {path}")
    mean, std = source.statistics or channel_statistics(x_train)
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes, list(mean), list(std))


def channel_statistics(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of a uint8 tensor (N, C, H, W), in pixel units of [0, 1].

    A channel without contrast gets the deviation 1, since images are divided by it. The histogram saves a
    floating-point copy of the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in x.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (weights @ values) / weights.sum()
        std = ((weights @ (values - mean) ** 2) / weights.sum()).sqrt()
        means.append(mean.item() / 255)
        stds.append(std.item() / 255 or 1.0)
    return means, stds


def pixels(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 images as values of dtype in [0, 1].

    This divides by a tensor on the images' device because a GPU multiplies by the rounded reciprocal of a Python
    number, which differs for 126 of the 256 values.
    """
    return images / torch.full((), 255, dtype=dtype, device=images.device)


def fingerprint(dataset: Dataset) -> str:
    """Return 16 hex digits that depend on the images, the labels, their shapes and their order."""
    digest = hashlib.sha256()
    for tensor in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


# ---- data sets that need no files -----------------------------------------------------------------------------------

def read_digits(name: str, data_dir: str) -> Tensors:
    try:
        from sklearn.datasets import load_digits  # slow to import, and only needed here
    except ImportError as error:
        raise ValueError(f"--dataset={name} needs scikit-learn ({last_line(error)}): run `pip install scikit-learn`"
                         ) from error
    digits = load_digits()
    x = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(digits.target).long()
    # The split must not depend on the seed, nor ever change: NumPy promises to keep the numbers of RandomState.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    train, test = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test], 10


def read_modular(operation: Callable, name: str, data_dir: str, seed: int, modulus: int = 97,
                 train_fraction: float = 0.5) -> Tensors:
    """Return all pairs (a, b) as one-hot rows, uint8 (1, 2, p), with the labels operation(a, b) mod p.

    This is the task of Power et al. 2022, arXiv:2201.02177.
    """
    if not 2 <= modulus <= LARGEST_MODULUS:
        raise ValueError(f"modulus must be from 2 to {LARGEST_MODULUS}, not {modulus}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must be above 0 and below 1, not {train_fraction}")
    pairs = modulus**2
    train = round(train_fraction * pairs)
    if train in (0, pairs):
        raise ValueError(f"train_fraction {train_fraction} leaves no pair to {'test' if train else 'train'} on, of "
                         f"{pairs} pairs")
    order = torch.from_numpy(np.random.default_rng((seed, SPLIT)).permutation(pairs))
    a, b = order // modulus, order % modulus
    x = (255 * torch.eye(modulus, dtype=torch.uint8))[torch.stack([a, b], 1)].unsqueeze(1)
    y = operation(a, b) % modulus
    return x[:train], y[:train], x[train:], y[train:], modulus


# ---- data sets that torchvision downloads ---------------------------------------------------------------------------

def fetch(name: str, dataset_class: Callable, data_dir: str, **options: Any) -> Any:
    """Return one of torchvision's data sets, downloaded if it is missing. OSError: that is not possible."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return dataset_class(data_dir, download=True, **options)
    except Exception as error:  # from urllib, http, tarfile, zlib, torchvision (RuntimeError), a full disk, ...
        source = DATASETS[name]
        by_hand = f", or put {source.archives} into {os.path.join(data_dir, source.folder)}" if source.archives else ""
        raise OSError(f"cannot download {name} ({last_line(error)}): run `python data.py {name}` on a machine with "
                      f"internet and copy its data directory here{by_hand}; --dataset=digits needs no download"
                      ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def read_mnist(dataset_class: type, name: str, data_dir: str) -> Tensors:
    """Read MNIST or a data set that has the same files.

    torchvision prefers MNIST/processed/*.pt of old versions, whatever they hold, and only checks what it downloads.
    """
    folder = os.path.join(data_dir, dataset_class.__name__)
    paths = [os.path.join(folder, "raw", file_name) for file_name in MNIST_FILES]
    if not all(map(os.path.exists, paths)):
        fetch(name, dataset_class, data_dir)
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing or not a regular file: {remedy(folder, name)}")
    splits = []
    for images, labels in (paths[:2], paths[2:]):
        try:
            x, y = read_image_file(images).unsqueeze(1), read_label_file(labels)
            if len(x) != len(y):
                raise ValueError(f"{len(x)} images and {len(y)} labels")
            if y.max() > 9:
                raise ValueError(f"the label {y.max()}, not only 0 to 9")
        except Exception as error:  # torchvision asserts what it expects
            raise ValueError(f"{images} or {labels} is damaged ({last_line(error)}): {remedy('both', name)}") from error
        splits += [x, y]
    return *splits, 10


def remedy(path: str | Path, name: str) -> str:
    return f"delete {path} and run `python data.py {name}` to download it again"


def check_md5(name: str, folder: str, files: Sequence) -> None:
    """Raise ValueError if one of the (file name, MD5) is there and damaged.

    torchvision would download it again: without a network its error would hide what is wrong.
    """
    for file_name, md5 in files:
        path = os.path.join(folder, file_name)
        if os.path.isfile(path) and not check_integrity(path, md5):
            raise ValueError(f"{path} is truncated or damaged (wrong MD5): {remedy(path, name)}")


def read_cifar(dataset_class: Any, name: str, data_dir: str) -> Tensors:
    meta = dataset_class.meta
    check_md5(name, os.path.join(data_dir, dataset_class.base_folder),
              [*dataset_class.train_list, *dataset_class.test_list, (meta["filename"], meta["md5"])])
    train, test = (fetch(name, dataset_class, data_dir, train=train) for train in (True, False))
    x_train, x_test = (torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test))
    return x_train, torch.tensor(train.targets), x_test, torch.tensor(test.targets), len(train.classes)


def read_svhn(name: str, data_dir: str) -> Tensors:
    check_md5(name, data_dir, [datasets.SVHN.split_list[split][1:] for split in ("train", "test")])
    train, test = (fetch(name, datasets.SVHN, data_dir, split=split) for split in ("train", "test"))
    x_train, x_test = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test))
    return x_train, torch.from_numpy(train.labels), x_test, torch.from_numpy(test.labels), 10


def read_imagenette(name: str, data_dir: str, image_size: int = DEFAULT_IMAGE_SIZE) -> Tensors:
    root = os.path.join(data_dir, "imagenette2-160")
    if not os.path.exists(root):
        fetch(name, datasets.Imagenette, data_dir, size="160px")
    # torchvision takes any folder of this name for the whole data set, even after an interrupted extraction.
    counts = {split: sum(path.name[0] != "." for path in Path(root, split).glob("*/*.JPEG"))
              for split in IMAGENETTE_COUNTS}
    if counts != IMAGENETTE_COUNTS:
        found, whole = ("{train} training and {val} test images".format(**c) for c in (counts, IMAGENETTE_COUNTS))
        raise ValueError(f"{root} holds {found} where Imagenette has {whole}, as after an interrupted extraction: "
                         f"{remedy(root, name)}; to train on a part of it, --dataset=imagefolder --data_dir={root}")
    return read_folder(name, root, image_size)


# ---- arrays in a file -----------------------------------------------------------------------------------------------

def read_npz(name: str, path: str) -> Tensors:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: give the .npz file with --data_dir")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = next((names for names in NPZ_NAMES if set(names) <= set(file.files)), ())
            arrays = [file[key] for key in names]
    except Exception as error:  # from zipfile, zlib, NumPy (a pickled array), memory, no permission, ...
        raise ValueError(f"cannot read {path} ({last_line(error)}): give a file that np.savez wrote, without pickled "
                         "arrays") from error
    if not names:
        raise ValueError(f"{path} does not hold the arrays {' or '.join(map(', '.join, NPZ_NAMES))}")
    splits: list[torch.Tensor] = []
    for i in (0, 2):
        splits += check_arrays(arrays[i], arrays[i + 1], *(f"{key} in {path}" for key in names[i:i + 2]))
    classes = int(max(splits[1].max(), splits[3].max())) + 1
    if not 2 <= classes <= len(splits[1]) + len(splits[3]):
        raise ValueError(f"the labels in {path} go up to {classes - 1}: number the classes from 0, at least two")
    return *splits, classes


def check_arrays(x: np.ndarray, y: np.ndarray, images: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, H, W) or (N, H, W, C) as (N, C, H, W), and labels (N,) or (N, 1) as int64 (N,).

    ValueError: they have another shape or dtype, or negative labels. It calls them `images` and `labels`.
    """
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0 or (x.ndim == 4 and x.shape[3] > 4):
        raise ValueError(f"{images} has the dtype {x.dtype} and the shape {x.shape}: give uint8, from 0 to 255, and "
                         "(N, H, W), or (N, H, W, C) with 1 to 4 channels")
    if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(f"{labels} has the dtype {y.dtype} and the shape {y.shape}: give an integer label for each of "
                         f"the {len(x)} images")
    y = y.astype(np.int64).reshape(-1)
    if y.min() < 0:
        raise ValueError(f"{labels} holds labels from {y.min()} to {y.max()}: number the classes from 0")
    x = np.ascontiguousarray(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2))
    return torch.from_numpy(x), torch.from_numpy(y)


# ---- folders of images ----------------------------------------------------------------------------------------------

def read_folder(name: str, root: str, image_size: int | None = None) -> Tensors:
    """Decode root/train and root/test (or root/val), or take the decoded images from the cache."""
    splits = train, test = scan(root, "train"), scan(root, "test", "val")
    differing = sorted(train.keys() ^ test.keys())
    if differing:
        raise ValueError(f"the training and the test images in {root} have different classes: only one of the two has "
                         f"a folder {', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}")
    if len(train) < 2:
        raise ValueError(f"{root} has only one class ({', '.join(train)}): at least two are needed")
    paths = [[path for images in split.values() for path in images] for split in splits]
    y_train, y_test = (torch.tensor([label for label, images in enumerate(split.values()) for _ in images])
                       for split in splits)
    cache, key = os.path.join(root, f"decoded-{image_size or 'auto'}.npz"), cache_key(root, sum(paths, []), image_size)
    images = load_cache(cache, key)
    if images is None:
        sizes = {(image_size, image_size)} if image_size else {size_of(path) for path in sum(paths, [])}
        size = sizes.pop() if len(sizes) == 1 else (DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
        images = [decode(split, size) for split in paths]
        if all(np.array_equal(image[:1].repeat(3, 0), image) for split in images for image in split):
            images = [np.ascontiguousarray(split[:, :1]) for split in images]  # no colour
        save_cache(cache, fingerprint=key, x_train=images[0], x_test=images[1])
    x_train, x_test = map(torch.from_numpy, images)
    return x_train, y_train, x_test, y_test, len(train)


def scan(root: str, *names: str) -> dict[str, list[str]]:
    """Return {class: paths of its images} for the first of the folders `names` in root that has classes.

    The images and their order are those of torchvision's ImageFolder, except that hidden ones are left out, and what
    is in @eaDir and the like.
    """
    folders = [path for path in (os.path.join(root, name) for name in names) if os.path.isdir(path)]
    if not folders:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(names)}/: the layout is train/CLASS/IMAGE and "
                                "test/CLASS/IMAGE (or val/); give the folder that holds them with --data_dir")
    found = {folder: sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] not in ".@")
             for folder in folders}
    folder = next(filter(found.get, folders), folders[-1])
    classes: dict[str, list[str]] = {name: [] for name in found[folder]}
    if classes:
        for path, label in make_dataset(folder, {name: i for i, name in enumerate(classes)}, allow_empty=True,
                                        is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS)):
            if not re.search(r"[/\\][.@]", path[len(folder):]):
                classes[found[folder][label]].append(path)
    empty = [os.path.join(folder, name) for name, images in classes.items() if not images] if classes else folders
    if empty:
        raise FileNotFoundError(f"no images in {empty[0]}: the layout is {os.path.join(root, names[0])}/CLASS/IMAGE, "
                                f"with at least one image ({' '.join(IMG_EXTENSIONS)}) for each class")
    return classes


def cache_key(root: str, paths: list[str], image_size: int | None) -> str:
    """Return a key that depends on the size wanted and on the name and content of each file.

    Size and date would not do: archives and `cp -p` replace files by others of the same date.
    """
    digest = hashlib.sha256(f"2 {image_size}".encode())
    for path in paths:
        with blaming(path):
            if not os.path.isfile(path):
                raise OSError("not a file, or a dangling link")
            digest.update(os.fsencode(os.path.relpath(path, root)) + b"\0")
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def load_cache(path: str, key: str) -> list[np.ndarray] | None:
    """Return [x_train, x_test], or None if the cache is missing, damaged, or made for something else."""
    # Whatever is wrong with a cache, the images are still there. Damage shows: a zip file carries checksums.
    with suppress(Exception), np.load(path) as cache:
        if str(cache["fingerprint"]) == key:
            return [cache["x_train"], cache["x_test"]]
    return None


def save_cache(path: str, **arrays: Any) -> None:
    """Write the cache under another name, then rename it. A folder that cannot be written gets no cache."""
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    with suppress(OSError):
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def blaming(path: str) -> Iterator[None]:
    """Turn whatever goes wrong into a ValueError that names the image."""
    try:
        yield
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for a damaged file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else last_line(error)
        raise ValueError(f"cannot read the image {path} ({reason}): replace or remove it") from error


def size_of(path: str) -> tuple[int, int]:
    with blaming(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        return image.size


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Return the image as RGB, uint8 (3, H, W): resized to cover size (width, height), then its centre."""
    with blaming(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.mode[0] in "IF":  # Pillow would clip values above 255 to white
            raise ValueError("more than 8 bits per channel")
        return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def decode(paths: list[str], size: tuple[int, int]) -> np.ndarray:
    """Return uint8 (N, 3, height, width); size: (width, height)."""
    shape = (len(paths), 3, size[1], size[0])
    try:
        images = np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        raise ValueError(f"{len(paths)} images of {size[0]}x{size[1]} pixels take {math.prod(shape) // 10**9:,} GB, "
                         "more memory than there is: choose a smaller image_size") from error

    def work(i: int) -> None:
        images[i] = read_image(paths[i], size)

    # Threads, not processes: Pillow decodes without the interpreter lock, and forking is unsafe after CUDA.
    thread_map(work, range(len(paths)), tqdm_class=tqdm, desc="decoding", unit="image", delay=1, leave=False,
               disable=None if sys.stderr else True)  # None: unless it is a terminal
    return images


def shape_text(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))


# ---- the registry ---------------------------------------------------------------------------------------------------

def like_mnist(dataset_class: type, url: str, statistics: tuple = ()) -> Source:
    archives = ", ".join(f"{name}.gz" for name in MNIST_FILES)
    return Source(partial(read_mnist, dataset_class), statistics, f"{archives} from {url}",
                  f"{dataset_class.__name__}/raw")


TORONTO = "https://www.cs.toronto.edu/~kriz/"
MODULAR: dict[str, Any] = dict(
    statistics=([0.0], [1.0]), options=("seed", "modulus", "train_fraction"), package="this program")
DATASETS = {
    "mnist": like_mnist(datasets.MNIST, "https://ossci-datasets.s3.amazonaws.com/mnist/", ([0.1307], [0.3081])),
    "fashion_mnist": like_mnist(datasets.FashionMNIST, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
    "kmnist": like_mnist(datasets.KMNIST, "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
    "cifar10": Source(
        partial(read_cifar, datasets.CIFAR10), ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), mirror=True,
        archives=f"cifar-10-python.tar.gz from {TORONTO}"),
    "cifar100": Source(
        partial(read_cifar, datasets.CIFAR100), ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]), mirror=True,
        archives=f"cifar-100-python.tar.gz from {TORONTO}"),
    "svhn": Source(read_svhn, archives="train_32x32.mat and test_32x32.mat from "
                                       "http://ufldl.stanford.edu/housenumbers/"),
    "imagenette": Source(
        read_imagenette, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), options=("image_size",), mirror=True,
        archives="imagenette2-160.tgz from https://s3.amazonaws.com/fast-ai-imageclas/"),
    "digits": Source(read_digits, package="scikit-learn"),
    "modular_addition": Source(partial(read_modular, operator.add), **MODULAR),
    "modular_subtraction": Source(partial(read_modular, operator.sub), **MODULAR),
    "modular_multiplication": Source(partial(read_modular, operator.mul), **MODULAR),
    "imagefolder": Source(read_folder, options=("image_size",)),
    "npz": Source(read_npz, is_file=True),
}


def main() -> None:
    parser = OneLineParser(prog="data.py", description="Download and check data sets without training.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", default="data", help="where data sets are kept; for imagefolder, the folder that "
                        "holds train/ and test/ or val/; for npz, the file (default: data)")
    parser.add_argument("--image_size", type=number(int, low=1), help="decode and cache images at this size in pixels; "
                        "for imagenette and imagefolder (default: 128, or the images' own size if all have the same)")
    args = parser.parse_args()
    with suppress(AttributeError):  # standard output may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may be unprintable
    path = os.path.abspath(os.path.expanduser(args.data_dir))
    try:
        for name, source in [(name, source_of(name)) for name in args.names]:
            dataset = load_dataset(name, args.data_dir, "all", image_size=args.image_size)
            print(f"{name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images, "
                  f"{shape_text(dataset.x_train)}, {dataset.num_classes} classes "
                  f"({f'part of {source.package}' if source.package else path})", flush=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "data.py: error: interrupted\n")


if __name__ == "__main__":
    main()
