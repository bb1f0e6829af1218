"""Data sets: contents, subsets, the cache of decoded folders, and one clear line for everything that is wrong."""

import errno
import os
import pickle
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision import datasets

import data


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every download fails as on a machine without internet."""
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def write_images(root, sizes=((8, 8),), classes=("cat", "dog"), splits=("train", "test"), suffix=".png"):
    """One image for each split, class and size; its colour tells them apart."""
    for s, split in enumerate(splits):
        for c, label in enumerate(classes):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for i, size in enumerate(sizes):
                Image.new("RGB", size, (50 * s, 100 * c, 10 * i)).save(folder / f"{i}{suffix}")
    return root


def write_idx(path, array):
    magic = 0x0800 + array.ndim
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array([magic, *array.shape], ">u4").tobytes() + array.astype(np.uint8).tobytes())


def write_mnist(root, train=1200, test=30, folder="MNIST"):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng.integers(256, size=(count, 28, 28))
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256  # each image knows its index
        write_idx(root / f"{folder}/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(root / f"{folder}/raw/{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    return root


def write_cifar10(root, monkeypatch, count=20):
    """CIFAR-10's batch files, small; torchvision is told their MD5 sums in place of the official ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, datasets.utils.calculate_md5(folder / name)]

    def batch(name):
        pixels = rng.integers(256, size=(count, 3072)).astype(np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(count)]})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch")])
    _, md5 = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return folder


def error_line(*args, **kwargs):
    """The message of the error that load_dataset raises; it has to be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        data.load_dataset(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def same_tensors(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("x_train", "y_train", "x_test", "y_test"))


def count_decoded(monkeypatch):
    """A list that grows by one path for each image read."""
    paths, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, *rest: paths.append(path) or read_image(path, *rest))
    return paths


# pixels, fingerprint

@pytest.mark.parametrize("dtype, numpy_dtype", [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_pixels_are_the_division_rounded_once(dtype, numpy_dtype):
    values = torch.arange(256).to(torch.uint8).reshape(4, 1, 8, 8)
    result = data.pixels(values, dtype)
    assert result.dtype == dtype and result.shape == values.shape
    assert np.array_equal(result.numpy().ravel(), (np.arange(256) / 255).astype(numpy_dtype))
    assert result.min() == 0 and result.max() == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pixels_are_the_same_on_a_gpu(dtype):
    values = torch.arange(256).to(torch.uint8)
    result = data.pixels(values.cuda(), dtype)
    assert result.is_cuda and torch.equal(result.cpu(), data.pixels(values, dtype))


def test_fingerprint_changes_with_the_data():
    expected = data.fingerprint(data.load_dataset("digits", train_size=30))
    assert expected == "fe331428324b256f"  # for ever: a resume compares it with an older run's
    for name, change in [("x_test", lambda x: x ^ 1), ("y_train", lambda y: (y + 1) % 10),
                         ("x_train", lambda x: x.flip(0)), ("x_train", lambda x: x.reshape(-1, 1, 4, 16))]:
        digits = data.load_dataset("digits", train_size=30)
        setattr(digits, name, change(getattr(digits, name)))
        assert data.fingerprint(digits) != expected
    digits = data.load_dataset("digits", train_size=30)
    digits.x_train = digits.x_train.transpose(2, 3).contiguous().transpose(2, 3)  # the same in another place of memory
    assert not digits.x_train.is_contiguous() and data.fingerprint(digits) == expected


# the registry

def test_a_data_set_is_one_entry(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "new", data.Source(data.DATASETS["kmnist"].read))
    write_mnist(tmp_path, train=60, folder="KMNIST")
    new = data.load_dataset("new", tmp_path)
    assert (new.name, len(new.x_train), len(new.x_test)) == ("new", 60, 30)
    assert new.mean == pytest.approx([(new.x_train.double() / 255).mean().item()])  # none was given
    assert "image_size is not for new" in error_line("new", tmp_path, image_size=8)
    assert run_main(monkeypatch, capsys, "new", "--data_dir", tmp_path)[0] == 0
    assert "new" in error_line("unknown")


# digits, subsets, label noise

def test_digits():
    digits = data.load_dataset("digits")
    assert digits.name == "digits" and digits.num_classes == 10
    assert digits.x_train.shape == (1000, 1, 8, 8) and digits.x_test.shape == (797, 1, 8, 8)
    assert digits.x_train.dtype == digits.x_test.dtype == torch.uint8
    assert digits.y_train.dtype == digits.y_test.dtype == torch.int64
    assert digits.x_train.min() == 0 and digits.x_train.max() == 255
    x = digits.x_train.double() / 255
    assert digits.mean == pytest.approx([x.mean().item()])
    assert digits.std == pytest.approx([x.std(correction=0).item()])


def test_subset_is_drawn_by_seed_and_the_test_set_stays():
    whole, first = data.load_dataset("digits"), data.load_dataset("digits", train_size=300, seed=1)
    again, other = (data.load_dataset("digits", train_size=300, seed=seed) for seed in (1, 2))
    assert first.x_train.shape == (300, 1, 8, 8) and first.y_train.shape == (300,)
    assert same_tensors(first, again)
    assert not torch.equal(first.x_train, other.x_train)
    assert torch.equal(first.x_test, other.x_test) and torch.equal(first.x_test, whole.x_test)
    assert (first.mean, first.std) == (whole.mean, whole.std)
    smaller = data.load_dataset("digits", train_size=100, seed=1)
    assert torch.equal(smaller.x_train, first.x_train[:100])


def test_label_noise():
    clean = data.load_dataset("digits", seed=3)
    noisy, again = (data.load_dataset("digits", seed=3, label_noise=0.4) for _ in range(2))
    other = data.load_dataset("digits", seed=4, label_noise=0.4)
    assert same_tensors(noisy, again)
    assert torch.equal(clean.x_train, noisy.x_train) and torch.equal(clean.y_test, noisy.y_test)
    changed = clean.y_train != noisy.y_train
    assert 330 <= changed.sum() <= 400  # of 400 replaced labels, one in ten is right by chance
    assert not torch.equal(changed, clean.y_train != other.y_train)
    assert noisy.y_train.min() >= 0 and noisy.y_train.max() <= 9
    everything = data.load_dataset("digits", label_noise=1.0)
    assert (everything.y_train == data.load_dataset("digits").y_train).float().mean() < 0.2
    assert (torch.bincount(everything.y_train, minlength=10) > 50).all()


def test_subset_and_label_noise_are_these_draws_for_ever():
    """A run that is resumed or measured again draws them again."""
    noisy = data.load_dataset("digits", train_size=111, seed=3, label_noise=0.5)
    rows = np.random.default_rng((3, 0)).permutation(1000)[:111]
    labels, rng = data.load_dataset("digits").y_train[rows], np.random.default_rng((3, 1))
    replaced = rng.permutation(111)[:56]  # 55.5 are rounded up
    labels[replaced] = torch.from_numpy(rng.integers(10, size=56))
    assert torch.equal(noisy.y_train, labels)


# modular arithmetic

@pytest.mark.parametrize("name, operation", [
    ("modular_addition", lambda a, b: a + b), ("modular_subtraction", lambda a, b: a - b),
    ("modular_multiplication", lambda a, b: a * b)])
def test_modular_arithmetic(tmp_path, name, operation):
    found = data.load_dataset(name, tmp_path / "nowhere", modulus=7, train_fraction=0.3, seed=1)
    assert (found.num_classes, found.mean, found.std) == (7, [0.0], [1.0])
    assert found.x_train.shape == (15, 1, 2, 7) and found.x_test.shape == (34, 1, 2, 7)
    pairs = []
    for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
        assert (x.sort(-1).values == torch.tensor([0] * 6 + [255])).all()
        a, b = x.argmax(-1)[:, 0].T
        assert torch.equal(y, operation(a, b).remainder(7))
        pairs += zip(a.tolist(), b.tolist(), strict=True)
    assert sorted(pairs) == [(a, b) for a in range(7) for b in range(7)]  # each once


def test_a_config_describes_its_modular_arithmetic():
    config = dict(dataset="modular_addition", data_dir="", train_size="all", seed=3, image_size=None, label_noise=0.0)
    dataset = data.from_config({**config, "modulus": 7, "train_fraction": 0.25})
    assert dataset.x_train.shape == (12, 1, 2, 7) and len(dataset.x_test) == 37
    assert len(data.from_config(config).x_train) == round(97**2 / 2)  # of an older program


def test_modular_arithmetic_is_split_by_seed():
    first, again, other = (data.load_dataset("modular_addition", seed=seed) for seed in (1, 1, 2))
    assert first.x_train.shape == (4704, 1, 2, 97) and len(first.x_test) == 97**2 - 4704
    assert same_tensors(first, again) and not torch.equal(first.x_test, other.x_test)
    fewer = data.load_dataset("modular_addition", seed=1, train_size=1000, label_noise=0.5)
    assert torch.equal(fewer.x_test, first.x_test) and torch.equal(fewer.y_test, first.y_test)
    right = fewer.x_train.argmax(-1)[:, 0].sum(1) % 97 == fewer.y_train
    assert len(right) == 1000 and 500 <= right.sum() <= 520


# arrays in a file

def arrays(shape=(8, 9), train=6, test=4, labels=(-1,), prefix=("x_train", "y_train", "x_test", "y_test")):
    rng = np.random.default_rng(0)
    splits = [array for n in (train, test) for array in (
        rng.integers(256, size=(n, *shape)).astype(np.uint8), (np.arange(n) % 3).reshape(labels))]
    return dict(zip(prefix, splits, strict=True))


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
@pytest.mark.parametrize("names", data.NPZ_NAMES)
def test_npz(tmp_path, shape, names):
    content = arrays(shape, labels=(-1, 1) if "train_labels" in names else (-1,), prefix=names)
    np.savez_compressed(tmp_path / "a.npz", val_images=np.zeros(3), **content)
    found = data.load_dataset("npz", tmp_path / "a.npz")
    expected = content[names[0]].reshape(6, 8, 9, -1)
    assert torch.equal(found.x_train.permute(0, 2, 3, 1), torch.from_numpy(expected)) and found.x_train.is_contiguous()
    assert found.y_test.tolist() == [0, 1, 2, 0] and found.y_test.dtype == torch.int64 and found.num_classes == 3
    assert found.mean == pytest.approx((expected / 255).mean((0, 1, 2)).tolist())
    assert len(data.load_dataset("npz", str(tmp_path / "a.npz"), train_size=2).x_train) == 2


@pytest.mark.parametrize("change, message", [
    ({"x_train": np.zeros((6, 8, 9))}, "images of float64"),
    ({"x_train": np.zeros((6, 72), np.uint8)}, r"images of uint8, \(6, 72\)"),
    ({"x_train": np.zeros((6, 8, 9, 5), np.uint8)}, "1 to 4 channels"),
    ({"x_test": np.zeros((0, 8, 9), np.uint8), "y_test": np.zeros(0, int)}, r"images of uint8, \(0, 8, 9\)"),
    ({"x_test": np.zeros((4, 8, 8), np.uint8)}, r"\(6, 1, 8, 9\) for training .*\(4, 1, 8, 8\) for test"),
    ({"y_train": np.zeros(6)}, "labels of float64"),
    ({"y_train": np.zeros(5, int)}, r"labels of int64, \(5,\)"),
    ({"y_test": np.array([0, 1, -1, 0])}, "from -1 to 2"),
    ({"y_test": np.array([0, 1, 2, 10**9])}, "from 0 to 1000000000"),
    ({"y_train": np.zeros(6, int), "y_test": np.zeros(4, int)}, "at least two"),
    ({"y_test": np.array([0, 1, 2, None], object)}, "pickle"),
    ({"x_test": None}, "with x_train, y_train, x_test, y_test or train_images"),
])
def test_bad_npz(tmp_path, change, message):
    content = {name: array for name, array in {**arrays(), **change}.items() if array is not None}
    np.savez(tmp_path / "a.npz", **content)
    assert re.search(message, error_line("npz", tmp_path / "a.npz"))


def test_npz_that_is_no_such_file(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "half.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:700])
    (tmp_path / "text.npz").write_text("text")
    for name in ("a.npy", "half.npz", "text.npz", ".", "nowhere.npz"):
        assert f"cannot read {tmp_path / name}" in error_line("npz", tmp_path / name)


# MNIST

def test_processes_that_start_together_do_not_read_half_a_download(tmp_path):
    class Slow:
        def __init__(self, folder, download, train):
            if not (tmp_path / "whole").exists():
                assert not (tmp_path / "part").exists(), "half a download"
                (tmp_path / "part").touch()
                time.sleep(0.2)
                (tmp_path / "part").rename(tmp_path / "whole")
            self.data, self.targets, self.classes = np.zeros((3, 8, 8), np.uint8), [0, 1, 2], "abc"

    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda _: data.read_torchvision(Slow, "slow", str(tmp_path)), range(3))]
    assert [x.shape for x, *_ in found] == [(3, 1, 8, 8)] * 3


def test_mnist_reads_torchvisions_layout(tmp_path):
    mnist = data.load_dataset("mnist", write_mnist(tmp_path), seed=7)
    assert mnist.x_train.shape == (1000, 1, 28, 28) and mnist.x_test.shape == (30, 1, 28, 28)
    assert mnist.x_train.dtype == torch.uint8 and mnist.y_train.dtype == torch.int64
    assert (mnist.num_classes, mnist.mean, mnist.std) == (10, [0.1307], [0.3081])
    index = mnist.x_train[:, 0, 0, 0].long() * 256 + mnist.x_train[:, 0, 0, 1]
    assert torch.equal(index % 10, mnist.y_train)  # images and labels were drawn together
    assert len(index.unique()) == 1000
    assert torch.equal(mnist.y_test, torch.arange(30) % 10)
    assert len(data.load_dataset("mnist", str(tmp_path), train_size=1200).x_train) == 1200
    assert len(data.load_dataset("mnist", str(tmp_path), train_size="all").x_train) == 1200


def test_mnist_smaller_than_the_default_subset_is_used_whole(tmp_path):
    assert len(data.load_dataset("mnist", write_mnist(tmp_path, train=60)).x_train) == 60


def test_incomplete_mnist_does_not_pass(tmp_path):
    (write_mnist(tmp_path) / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    assert "cannot read or download mnist" in error_line("mnist", tmp_path)


@pytest.mark.parametrize("name, folder", [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_data_sets_with_the_files_of_mnist(tmp_path, name, folder):
    found = data.load_dataset(name, write_mnist(tmp_path, folder=folder))
    assert found.x_train.shape == (1000, 1, 28, 28) and found.x_test.shape == (30, 1, 28, 28)
    assert found.num_classes == 10 and 0.4 < found.mean[0] < 0.6 and 0.2 < found.std[0] < 0.4


# CIFAR

def test_cifar10(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path, monkeypatch)
    cifar = data.load_dataset("cifar10", tmp_path)
    assert cifar.x_train.shape == (100, 3, 32, 32) and cifar.x_test.shape == (20, 3, 32, 32)
    assert cifar.x_train.dtype == torch.uint8 and cifar.y_train.dtype == torch.int64
    assert cifar.num_classes == 10 and len(cifar.mean) == len(cifar.std) == 3
    batch = pickle.loads((folder / "test_batch").read_bytes())
    assert np.array_equal(cifar.x_test.numpy().reshape(20, 3072), batch["data"])
    assert cifar.y_test.tolist() == batch["labels"]


# Imagenette

def test_imagenette(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IMAGENETTE_COUNTS", (4, 4))
    root = write_images(tmp_path / "imagenette2-160", sizes=((160, 200), (213, 160)),
                        classes=("n01440764", "n02102040"), splits=("train", "val"), suffix=".JPEG")
    imagenette = data.load_dataset("imagenette", tmp_path)
    assert imagenette.x_train.shape == imagenette.x_test.shape == (4, 3, 128, 128)
    assert imagenette.mean == [0.485, 0.456, 0.406] and imagenette.std == [0.229, 0.224, 0.225]
    assert data.load_dataset("imagenette", tmp_path, image_size=64).x_test.shape == (4, 3, 64, 64)
    (root / "val/n02102040/._0.JPEG").touch()  # as macOS leaves them
    assert len(data.load_dataset("imagenette", tmp_path, image_size=64).x_test) == 4
    (root / "val/n02102040/0.JPEG").unlink()
    line = error_line("imagenette", tmp_path)
    assert "holds (4, 3) training and test images" in line and "python data.py imagenette" in line


# a folder of images, and its cache

def test_imagefolder_keeps_a_common_size(tmp_path):
    folder = data.load_dataset("imagefolder", write_images(tmp_path, sizes=((12, 8),) * 2))
    assert folder.x_train.shape == folder.x_test.shape == (4, 3, 8, 12)
    assert folder.x_train.dtype == torch.uint8 and folder.y_train.dtype == torch.int64
    assert folder.num_classes == 2 and folder.y_train.tolist() == folder.y_test.tolist() == [0, 0, 1, 1]
    assert folder.x_test[:, :, 5, 5].tolist() == [[50, 0, 0], [50, 0, 10], [50, 100, 0], [50, 100, 10]]
    assert folder.mean == pytest.approx([0, 50 / 255, 5 / 255])
    assert folder.std == pytest.approx([1, 50 / 255, 5 / 255])  # red has no contrast: 1, to divide by


def test_imagefolder_of_several_sizes_is_cut_to_squares(tmp_path):
    write_images(tmp_path, sizes=((150, 130), (140, 160)), splits=("train", "val"))
    assert data.load_dataset("imagefolder", tmp_path).x_train.shape == (4, 3, 128, 128)
    assert data.load_dataset("imagefolder", tmp_path, image_size=16).x_test.shape == (4, 3, 16, 16)
    write_images(tmp_path / "other", sizes=((8, 8),) * 2)
    Image.new("RGB", (9, 8)).save(tmp_path / "other/test/dog/1.png")  # only the last one differs
    assert data.load_dataset("imagefolder", tmp_path / "other").x_train.shape == (4, 3, 128, 128)


def test_shorter_side_is_resized_then_the_centre_cut(tmp_path):
    write_images(tmp_path)
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255  # three squares: black, white, black
    Image.fromarray(stripes).save(tmp_path / "train/cat/0.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "train/dog/0.png")
    x = data.load_dataset("imagefolder", tmp_path, image_size=10).x_train
    assert (x[:, :, 1:-1, 1:-1] == 255).all() and x.min() > 200  # interpolation lets a little black in at the border


def test_folder_without_colour_has_one_channel(tmp_path):
    write_images(tmp_path)
    for i, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        Image.new("L" if i else "RGB", (8, 8), i or (60, 60, 60)).save(path)
    for _ in range(2):  # decoded, then from the cache
        folder = data.load_dataset("imagefolder", tmp_path)
        assert folder.x_train.shape == (2, 1, 8, 8) and len(folder.mean) == 1
        assert folder.x_test[:, 0, 0, 0].tolist() == [60, 1]  # test comes before train
    Image.new("RGB", (8, 8), (7, 7, 8)).save(path)
    assert data.load_dataset("imagefolder", tmp_path).x_train.shape == (2, 3, 8, 8)


def test_other_formats_under_an_image_name_are_refused(tmp_path, monkeypatch):
    path = write_images(tmp_path) / "train/cat/0.png"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    for format_name in ("EPS", "GIF"):
        Image.new("RGB", (8, 8)).save(path, format=format_name)
        assert str(path) in error_line("imagefolder", tmp_path)
    Image.new("RGB", (8, 8)).save(path, format="JPEG")  # another of the promised formats is harmless
    assert len(data.load_dataset("imagefolder", tmp_path).x_train) == 2


def test_grey_palette_and_alpha_images_become_rgb(tmp_path):
    write_images(tmp_path, sizes=((8, 8),))
    Image.new("L", (8, 8), 77).save(tmp_path / "train/cat/0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "train/dog/0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "test/dog/0.png")  # transparent: white
    Image.new("RGB", (8, 8), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "test/cat/0.png")
    folder = data.load_dataset("imagefolder", tmp_path)
    assert folder.x_train[:, :, 0, 0].tolist() == [[77, 77, 77], [1, 2, 3]]
    assert folder.x_test[:, :, 0, 0].tolist() == [[9, 8, 7], [255, 255, 255]]


def test_cache_is_used_and_equal(tmp_path, monkeypatch):
    write_images(tmp_path, sizes=((8, 8), (9, 9)))
    first = data.load_dataset("imagefolder", tmp_path, image_size=6)
    assert [path.name for path in tmp_path.glob("decoded*")] == ["decoded-6.npz"]
    decoded = count_decoded(monkeypatch)
    for root in (tmp_path, f"{tmp_path}/"):
        assert same_tensors(first, data.load_dataset("imagefolder", root, image_size=6))
    assert decoded == []
    assert data.load_dataset("imagefolder", tmp_path, image_size=7).x_train.shape == (4, 3, 7, 7)
    assert len(decoded) == 8


def repaint(root):
    path = root / "test/cat/0.png"
    before = path.stat()
    content = path.read_bytes()
    Image.new("RGB", (8, 8), (51, 0, 0)).save(path)  # of the same size and date, as cp -p and archives leave it
    assert path.stat().st_size == before.st_size and path.read_bytes() != content
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [
    repaint,
    lambda root: Image.new("RGB", (8, 8), (200, 0, 0)).save(root / "train/cat/new.png"),
    lambda root: (root / "train/cat/1.png").rename(root / "train/dog/other.png"),
])
def test_changed_folder_is_decoded_again(tmp_path, monkeypatch, change):
    write_images(tmp_path, sizes=((8, 8),) * 2)
    data.load_dataset("imagefolder", tmp_path)
    change(tmp_path)
    decoded = count_decoded(monkeypatch)
    changed = data.load_dataset("imagefolder", tmp_path)
    assert decoded
    (tmp_path / "decoded-auto.npz").unlink()
    assert same_tensors(changed, data.load_dataset("imagefolder", tmp_path))


def flip_pixel(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("damage", [
    flip_pixel,
    lambda content: content[:len(content) // 2],
    lambda content: b"not a cache",
])
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, damage):
    write_images(tmp_path, sizes=((64, 64),))
    first = data.load_dataset("imagefolder", tmp_path)
    cache = tmp_path / "decoded-auto.npz"
    cache.write_bytes(damage(cache.read_bytes()))
    assert same_tensors(first, data.load_dataset("imagefolder", tmp_path))
    decoded = count_decoded(monkeypatch)
    assert same_tensors(first, data.load_dataset("imagefolder", tmp_path))
    assert decoded == []  # the load before left a sound cache


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_failed_write_leaves_the_older_cache_whole(tmp_path, monkeypatch, error):
    write_images(tmp_path)
    data.load_dataset("imagefolder", tmp_path)
    before = (tmp_path / "decoded-auto.npz").read_bytes()
    repaint(tmp_path)

    def failing(file, **arrays):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(data.np, "savez", failing)
    with suppress(KeyboardInterrupt):
        assert len(data.load_dataset("imagefolder", tmp_path).x_train) == 2  # a full disk only costs the cache
    assert (tmp_path / "decoded-auto.npz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoded-auto.npz", "test", "train"]


def test_images_are_torchvisions_in_its_order_without_hidden_ones(tmp_path):
    names = ["a/x.PNG", "a/10.png", "a/9.jpeg", "a/sub/deep/0.png", "a/sub/1.png", "a/sub-2/0.png", "a/note.txt",
             "a/sub.png/2.bmp", "B/0.png", "été/0.webp", "é/0.tif"]
    hidden = ["a/.hidden.png", "a/._x.png", "a/@eaDir/x.png", "a/sub/.thumbs/0.png", ".ipynb_checkpoints/0.png",
              "@eaDir/0.png"]

    def write(names):
        for name in names:
            path = tmp_path / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    write(names)
    expected = datasets.ImageFolder(tmp_path / "train")
    write(hidden)
    classes = data.scan(tmp_path, "train")
    assert list(classes) == expected.classes and len(expected.samples) == 10
    assert [(path, label) for label, paths in enumerate(classes.values()) for path in paths] == expected.samples


def test_test_folder_without_classes_beside_a_sound_val(tmp_path):
    write_images(tmp_path, splits=("train", "val"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test/images.txt").touch()
    (tmp_path / "test/.ipynb_checkpoints").mkdir()
    assert len(data.load_dataset("imagefolder", tmp_path).x_test) == 2


def test_one_class_is_refused(tmp_path):
    assert "at least two classes" in error_line("imagefolder", write_images(tmp_path, classes=("cat",)))


def test_other_links_are_followed(tmp_path):
    write_images(tmp_path / "data")
    write_images(tmp_path / "pool", sizes=((8, 8),) * 3, splits=("all",))
    (tmp_path / "data/train/cat/more").symlink_to(tmp_path / "pool/all/cat")
    (tmp_path / "data/train/dog/1.png").symlink_to(tmp_path / "pool/all/dog/1.png")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "kitten").symlink_to(tmp_path / "pool/all/cat")
    (tmp_path / "link").symlink_to("data")
    folder = data.load_dataset("imagefolder", tmp_path / "link")
    assert folder.y_train.tolist() == [0] * 4 + [1] * 2 + [2] * 3


def test_link_to_nothing_is_named(tmp_path):
    path = write_images(tmp_path) / "train/cat/7.png"
    path.symlink_to("nowhere")
    assert str(path) in error_line("imagefolder", tmp_path)


def test_names_that_are_no_utf8(tmp_path):
    classes = "chaton été", "狗", "\udcff\udcfe"
    folder = data.load_dataset("imagefolder", write_images(tmp_path / "\udcff", classes=classes))
    assert folder.y_train.tolist() == [0, 1, 2]


def test_standard_error_closed(tmp_path, monkeypatch):
    write_images(tmp_path)
    read_image = data.read_image
    monkeypatch.setattr(data, "read_image", lambda *args: time.sleep(0.3) or read_image(*args))  # a bar would show
    monkeypatch.setattr(sys, "stderr", None)
    assert len(data.load_dataset("imagefolder", tmp_path, image_size=8).x_train) == 2


def test_other_classes_for_test(tmp_path):
    (write_images(tmp_path) / "test/dog").rename(tmp_path / "test/wolf")
    assert "a folder dog, wolf" in error_line("imagefolder", tmp_path)


# bad arguments and bad directories

@pytest.mark.parametrize("name, options, message", [
    ("mnits", {}, "unknown data set 'mnits': choose from mnist, "),
    ("digits", {"train_size": 0}, "from 1 to 1000"),
    ("digits", {"train_size": 1001}, "from 1 to 1000"),
    ("digits", {"label_noise": 1.01}, "label_noise"),
    ("digits", {"label_noise": float("nan")}, "label_noise"),
    ("digits", {"image_size": 28}, "image_size is not for digits"),
    ("digits", {"modulus": 97}, "modulus is not for digits"),
    ("modular_addition", {"modulus": 1}, "modulus must be from 2 to 500"),
    ("modular_addition", {"modulus": 501}, "modulus must be from 2 to 500"),
    ("modular_addition", {"train_fraction": 1.0}, "no pair"),
    ("modular_addition", {"train_fraction": float("nan")}, "NaN"),
    ("modular_addition", {"modulus": 3, "train_fraction": 0.01}, "no pair"),
    ("modular_addition", {"modulus": 3, "train_fraction": 0.99}, "no pair"),
])
def test_bad_arguments(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load_dataset(name, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []  # refused before anything is fetched


def test_data_dir_missing_or_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in .*--data_dir"):
        data.load_dataset("imagefolder", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert len(data.load_dataset("digits", tmp_path / "file").x_train) == 1000  # it needs no directory
    for name in ("mnist", "cifar10", "imagenette", "imagefolder"):
        assert str(tmp_path / "file") in error_line(name, tmp_path / "file")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenette"])
def test_no_network(tmp_path, name):
    line = error_line(name, tmp_path)
    for part in ("Name or service not known", str(tmp_path), f"python data.py {name}", "--dataset=digits"):
        assert part in line
    assert error_line(name, tmp_path) == line  # what the failure left behind does not pass


def test_a_silent_host_does_not_hang_the_program(tmp_path, monkeypatch):
    timeouts = []

    def urlopen(*args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    socket.setdefaulttimeout(77)
    try:
        assert "timed out" in error_line("cifar10", tmp_path)
        assert socket.getdefaulttimeout() == 77
    finally:
        socket.setdefaulttimeout(None)
    assert timeouts and all(timeout <= 60 for timeout in timeouts)


# python data.py NAME ...

def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    try:
        data.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_command_line_prints_one_line_a_data_set(tmp_path, monkeypatch, capsys):
    status, out, err = run_main(monkeypatch, capsys, "digits", "modular_addition", "mnist", "--data_dir",
                                write_mnist(tmp_path))
    assert (status, err) == (0, "")
    digits, modular, mnist = out.splitlines()
    assert modular == "modular_addition: 4,704 training and 4,705 test images, 1x2x97, 97 classes"
    assert mnist == "mnist: 1,200 training and 30 test images, 1x28x28, 10 classes"
    assert digits == "digits: 1,000 training and 797 test images, 1x8x8, 10 classes"


@pytest.mark.parametrize("arguments, message", [
    ([], "NAME"),
    (["digits", "mnits"], "invalid choice: 'mnits'"),
    (["imagefolder", "--image_size", "0"], "--image_size"),
    (["imagefolder", "--data_dir", "EMPTY"], "no images in"),
    (["digits", "--bogus"], "--bogus"),
])
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    arguments = [tmp_path if argument == "EMPTY" else argument for argument in arguments]
    status, out, err = run_main(monkeypatch, capsys, *arguments)
    assert status == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1
