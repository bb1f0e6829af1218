"""Bad command lines, data and files: one line on stderr that names the culprit, exit status 2, no traceback, and what
was there before is as it was."""

import functools
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from conftest import SMALL, run_here
from PIL import Image
from test_data import write_cifar10, write_idx, write_images, write_mnist

import data
import plot
import train
from records import checkpoints

TINY = [*SMALL, "--train_size=60", "--batch_size=20", "--lc_samples=4"]
HISTORY = "logs/training_history.json"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Work in an empty folder, without a network, and with the digits parsed once."""
    def urlopen(*_args, **_options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(sklearn.datasets, "load_digits", load_digits)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.chdir(tmp_path)


load_digits = functools.cache(sklearn.datasets.load_digits)


@pytest.fixture(scope="module")
def earlier_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    run_here(folder, *TINY, "--n_steps=3")
    return folder


@pytest.fixture
def earlier(earlier_run, tmp_path):
    """Lay an earlier run's files into the folder."""
    for part in ("logs", "checkpoints"):
        shutil.copytree(earlier_run / part, tmp_path / part)


def files():
    """Return {path: content} of all that is in the folder; a folder's content is None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))}


def refusal(capsys, program, *flags):
    """Run a program in this process; return the one line that it prints on stderr. It has to refuse, and cleanly."""
    before = files()
    sys.argv[1:] = flags  # data.py reads them from there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda *_: pytest.fail("not refused"))
        try:
            status = program.main() if program is data else program.main([*flags])
        except SystemExit as error:
            status = error.code
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith(Path(program.__file__).name), err
    assert len(err) < 1000 and "Traceback" not in out + err
    after = files()
    # torchvision makes an empty folder before it downloads.
    made = {path for path in after.keys() - before.keys() if not (path.startswith("data") and not after[path])}
    assert not made and {path: after[path] for path in before} == before
    return err


# ---- the command line -----------------------------------------------------------------------------------------------

FLAGS = [
    # no such choice
    ("--model=transformer", "transformer"), ("--keep_checkpoints=first", "first"), ("--compile=yes", "--compile"),
    # not a number, or the wrong kind
    ("--lr=fast", "fast"), ("--batch_size=1.5", "1.5"), ("--train_size=some", "some"), ("--epsilons=8/0", "8/0"),
    ("--epsilons=0.1,,0.2", "--epsilons"), ("--epsilons", "--epsilons"), ("--lc_radius=wide", "wide"),
    # not finite, or out of range
    ("--lr=nan", "nan"), ("--lr=0", "--lr"), ("--batch_size=0", "--batch_size"), ("--label_noise=1.5", "1.5"),
    ("--epsilons=2", "--epsilons"), ("--pgd_step_size=0", "--pgd_step_size"),
    # beyond what a machine can count or hold
    ("--n_steps=1" + "0" * 400, "--n_steps"), ("--width=1000000000000", "memory"),
    ("--width=9000000000000000000", "memory"), ("--lc_samples=1000000000000", "--lc_samples"),
    ("--pgd_restarts=10000000000", "--pgd_restarts"), ("--threads=100000", "--threads"),
    # against one another
    ("--n_steps=3 --n_epochs=3", "--n_epochs"), ("--epsilons=0.1,0.10000001", "--epsilons"),
    ("--batch_norm --batch_size=1", "--batch_norm"), ("--pgd_start=image --pgd_restarts=2", "--pgd_restarts"),
    ("--momentum=0.9", "--momentum"), ("--adam_eps=1e-9 --optimizer=sgd", "--adam_eps"),
    ("--log_interval=3", "--log_points"), ("--lc_samples=0", "--lc_directions"), ("--modulus=7", "--modulus"),
    ("--lr_schedule=cosine", "--lr_schedule=cosine"),
    ("--warmup_steps=3 --n_steps=3", "--warmup_steps=3"), ("--label_smoothing=0.1 --loss=mse", "label_smoothing"),
    # no such flag; a decimal comma; an unset shell variable
    ("--res", "--res"), ("mnist", "mnist"), ("--dpeth=3", "did you mean --depth?"),
    ("--data-dir=x", "did you mean --data_dir?"), ("--epsilons=8", "8/255?"),
    ("--preset=frist", "frist"), ("--epsilons=0,1", "0.1"), ("--log_dir=", "--log_dir"),
    # against the data or the machine
    ("--batch_size=61", "--batch_size=61"), ("--train_size=1001", "1001"), ("--image_size=8", "image_size"),
    ("--lc_directions=65", "--lc_directions=65"), ("--depth=3 --model=cnn", "depth"), ("--augment", "--augment"),
    ("--certify=5 --activation=gelu", "--certify"), ("--certify=5 --model=cnn", "--certify"),
    ("--device=tpu", "tpu"), ("--device=cuda:99", "cuda"),
    # against the earlier run, and a run that is not there
    ("--resume --model=resnet18", "--model was mlp"), ("--resume --n_steps=2", "--n_steps=2"),
    ("--branch_from=nowhere.pt", "nowhere.pt"),
    # places that cannot be written (a path below a file: permissions do not bind every user)
    (f"--log_dir={HISTORY}", HISTORY), (f"--save_dir={HISTORY}/checkpoints", HISTORY),
    ("--save_dir=/proc/checkpoints", "/proc"),
]


@pytest.mark.parametrize("flags, culprit", FLAGS, ids=lambda value: value[:40] if value.startswith("-") else "")
def test_bad_flags(earlier, capsys, flags, culprit):
    assert culprit in refusal(capsys, train, *TINY, *flags.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(earlier, capsys):
    assert "--device=cuda" in refusal(capsys, train, *TINY, "--device=cuda")


# ---- the data -------------------------------------------------------------------------------------------------------

def change(path, function):
    path.write_bytes(function(path.read_bytes()))


def mnist(name=None, damage=None):
    def lay(_monkeypatch):
        folder = write_mnist(Path("data")) / "MNIST" / "raw"
        if name:
            change(folder / name, damage)
    return lay


def cifar(name, damage):
    def lay(monkeypatch):
        change(write_cifar10(Path("data"), monkeypatch) / name, damage)
    return lay


def folder(damage, **options):
    def lay(_monkeypatch):
        write_images(Path("data"), **options)
        damage()
    return lay


def write(path, content):
    def damage():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    return damage


def imagenette(**options):
    def lay(_monkeypatch):
        root = Path("data/imagenette2-160")
        root.mkdir(parents=True)
        write_images(root, suffix=".JPEG", **options)
    return lay


def cut_image():
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save("data/train/cat/0.jpg")
    change(Path("data/train/cat/0.jpg"), lambda content: content[:-500])


def image_of_16_bits():
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save("data/train/cat/deep.png")


def nothing():
    pass


CAT = "data/train/cat/0.png"
DATA = [
    # nothing there, and no network
    ("mnist", lambda _: None, "python data.py mnist"), ("cifar10", lambda _: None, "python data.py cifar10"),
    ("cifar100", lambda _: None, "--dataset=digits"), ("imagenette", lambda _: None, "python data.py imagenette"),
    ("imagefolder", lambda _: None, "data"),
    # the data directory is a file
    ("mnist", lambda _: write("data", b"")(), "Not a directory: 'data"),
    ("imagefolder", lambda _: write("data", b"")(), "no images in data"),
    # MNIST
    ("mnist", mnist("train-images-idx3-ubyte", lambda b: b"\0\0\x0d\x03" + b[4:]), "delete what data holds of it"),
    ("mnist", mnist("train-images-idx3-ubyte", lambda b: b[:-1]), "python data.py mnist"),
    ("mnist", mnist("t10k-labels-idx1-ubyte", lambda b: b""), "python data.py mnist"),
    ("mnist", mnist("t10k-images-idx3-ubyte", lambda b: b[:12]), "python data.py mnist"),
    ("mnist", mnist("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\xff"), "to 255"),
    ("mnist", mnist("train-labels-idx1-ubyte", lambda b: b[:4] + b"\0\0\0\1\0"), "with 1 labels"),
    # CIFAR
    ("cifar10", cifar("data_batch_2", lambda b: b[:-100]), "python data.py cifar10"),
    ("cifar10", cifar("test_batch", lambda b: b""), "python data.py cifar10"),
    ("cifar10", cifar("batches.meta", lambda b: b[::-1]), "metadata"),
    # Imagenette: torchvision looks only whether the folder is there
    ("imagenette", imagenette(splits=()), "no images in data/imagenette2-160/train"),
    ("imagenette", imagenette(splits=("train", "val"), classes=("n01440764",)), "9469"),
    # folders of images
    ("imagefolder", lambda _: Path("data").mkdir(), "train"),
    ("imagefolder", lambda _: Path("data/train").mkdir(parents=True), "data"),
    ("imagefolder", folder(nothing, splits=("train",)), "test"),
    ("imagefolder", folder(nothing, splits=("test",)), "train"),
    ("imagefolder", folder(lambda: Path("data/train/empty").mkdir()), "empty"),
    ("imagefolder", folder(nothing, classes=()), "data"),
    ("imagefolder", folder(write("data/test/bird/0.png", b"")), "bird"),
    ("imagefolder", folder(write(CAT, b"")), CAT),
    ("imagefolder", folder(write(CAT, b"no image")), CAT),
    ("imagefolder", folder(write(CAT, b"\x89PNG\r\n\x1a\n" + bytes(40))), CAT),
    ("imagefolder", folder(cut_image), "data/train/cat/0.jpg"),
    ("imagefolder", folder(image_of_16_bits), "deep.png"),
    ("imagefolder", folder(lambda: os.replace("data/train", "data/training")), "train"),
]


@pytest.mark.parametrize("dataset, lay, culprit", DATA, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_data(earlier, capsys, monkeypatch, dataset, lay, culprit):
    lay(monkeypatch)
    flags = [flag for flag in TINY if not flag.startswith(("--dataset", "--train_size", "--batch_size"))]
    line = refusal(capsys, train, *flags, f"--dataset={dataset}", "--data_dir=data", "--batch_size=2")
    assert culprit in line
    assert culprit in refusal(capsys, data, dataset, "--data_dir=data")


@pytest.mark.parametrize("flags, culprit", [
    (["imagenet"], "imagenet"), ([], "NAME"), (["digits", "--image_size=0"], "image_size"),
    (["digits", "--image_size=big"], "big"), (["digits", "--image_size=8"], "image_size"),
    (["digits", "--fast"], "--fast"), (["mnist", "digits", "no_such_set"], "no_such_set")], ids=" ".join)
def test_bad_flags_of_data(capsys, flags, culprit):
    assert culprit in refusal(capsys, data, *flags)


def test_the_tables_data_are_sound_before_the_damage(earlier_run, capsys, monkeypatch):
    """What the cases above lay out trains, so it is the damage that they are refused for."""
    mnist()(monkeypatch)
    write_idx(Path("data/MNIST/raw/unrelated"), np.zeros((1, 2, 2)))
    write_images(Path("folder"))
    flags = [flag for flag in TINY if not flag.startswith(("--dataset", "--train_size", "--batch_size"))]
    for dataset, data_dir in (("mnist", "data"), ("imagefolder", "folder")):
        run_here(".", *flags, f"--dataset={dataset}", f"--data_dir={data_dir}", "--batch_size=2", "--n_steps=1")
    write_cifar10(Path("data"), monkeypatch)
    run_here(".", *flags, "--dataset=cifar10", "--batch_size=2", "--n_steps=1")


# ---- histories and checkpoints --------------------------------------------------------------------------------------

def without(key):
    """Take a key out of the history."""
    history = json.loads(Path(HISTORY).read_text())
    del history[key]
    Path(HISTORY).write_text(json.dumps(history))


def newest():
    return checkpoints.saved_checkpoints("checkpoints")[0]


PLOTS = [
    ("--no_such_flag", nothing, "--no_such_flag"), ("nowhere.json", nothing, "nowhere.json"), ("sums", nothing, "sums"),
    (HISTORY, write(HISTORY, b"{"), HISTORY), (HISTORY, write(HISTORY, b"\x80\x04"), HISTORY),
    (HISTORY, lambda: without("config"), HISTORY),
    (f"--summary {HISTORY} nowhere.json", nothing, "nowhere.json"),
    (f"{HISTORY} --out={HISTORY}/figure", nothing, HISTORY),
    (f"--partition {HISTORY}", nothing, HISTORY), ("--partition", nothing, "--partition"),
    ("--partition bad.pt", write("bad.pt", b"cos\nsystem\n(S'touch proof'\ntR."), "bad.pt"),
    ("--partition bad.pt", lambda: torch.save({"step": 3}, "bad.pt"), "bad.pt"),
]


@pytest.mark.parametrize("flags, lay, culprit", PLOTS, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_files_for_plot(earlier, capsys, flags, lay, culprit):
    lay()
    assert culprit in refusal(capsys, plot, *flags.split())


@pytest.mark.parametrize("lay", [write(HISTORY, b"no JSON"), lambda: os.remove(HISTORY), lambda: without("warnings")])
def test_bad_history_at_a_resume(earlier, capsys, lay):
    lay()
    assert HISTORY in refusal(capsys, train, *TINY, "--n_steps=3", "--resume")


def test_a_checkpoint_of_another_model_at_a_resume(earlier, capsys, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other")
    run_here(elsewhere, *TINY, "--n_steps=20", "--model=cnn", "--width=4")
    other = checkpoints.saved_checkpoints(elsewhere / "checkpoints")[0]
    capsys.readouterr()
    shutil.copy(other, "checkpoints")
    line = refusal(capsys, train, *TINY, "--n_steps=20", "--resume")
    assert other.name in line and "--model was cnn, is mlp" in line and "--width was 4, is 16" in line
