"""Data sets from every source: what comes out of each, and what is refused."""

import hashlib
import importlib
import io
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import refused
from torch import Tensor

from tost_plugins.lab.data import Augment, Data, Loader, Split, load

PLAIN = {"path": None, "limit": None, "validation": 0, "augment": False, "image_size": None}


def read(name: str, **options: Any) -> Data:
    return load(SimpleNamespace(name=name, **{**PLAIN, **options}))


def refused_of(name: str, **options: Any) -> str:
    return refused(lambda: read(name, **options))


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = read("digits", augment=True)
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert (len(data.validation), len(data.test)) == (0, 360)
    assert data.train.images.max() == 255
    assert data.classes == 10
    assert data.class_names == tuple("0123456789")
    assert data.augment == Augment(padding=1, flip=False)
    assert torch.bincount(data.test.labels).min() >= 35
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx([pixels.mean().item()])
    assert data.std == pytest.approx([pixels.std(correction=0).item()])


def test_digits_grow_by_repeating_their_pixels() -> None:
    pytest.importorskip("sklearn")
    small, large = read("digits").train.images, read("digits", image_size=16).train.images
    assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_held_out_images_are_disjoint_and_fixed() -> None:
    pytest.importorskip("sklearn")
    data = read("digits", validation=200, limit=500)
    assert (len(data.train), len(data.validation), len(data.test)) == (500, 200, 360)
    parts = [rows(data.train), rows(data.validation), rows(data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert torch.bincount(data.validation.labels).tolist() == [20] * 10
    more = read("digits", validation=200)
    assert torch.equal(more.validation.images, data.validation.images)
    assert torch.equal(more.train.images[:500], data.train.images)
    assert len(more.train) == 1237
    assert data.augment is None


def test_numbers_that_do_not_fit() -> None:
    pytest.importorskip("sklearn")
    assert refused_of("digits", validation=1437) == (
        "data.validation: expected 0..1436 of 1437 training images, got 1437; lower it"
    )
    assert refused_of("digits", validation=1400, limit=38) == (
        "data.limit: expected 1..37 training images (1400 are held out for validation), got 38; "
        "change it, or leave it out"
    )
    assert "got 0; change it" in refused_of("digits", limit=0)
    assert refused_of("digits", image_size=0) == "data.image_size: expected 1 pixel or more, got 0; 32 is usual"
    assert refused_of("digits", path="x") == "data.path: expected nothing for 'digits', got 'x'; remove it"


def test_unknown_name() -> None:
    assert refused_of("cifar") == (
        "data.name: expected a known data set, got 'cifar'; did you mean 'cifar10'? "
        "known: cifar10, cifar100, digits, folder"
    )


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert refused_of("digits") == (
        "data: expected the package 'scikit-learn', got none; run: pip install 'tost_plugins[vision]'"
    )


def pictures(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def write_parquet(path: Path, pixels: Any, targets: list[int], image: str, label: str, classes: int = 0) -> None:
    datasets = pytest.importorskip("datasets")
    pil = pytest.importorskip("PIL.Image")
    kind = datasets.ClassLabel(names=[f"kind {n}" for n in range(classes)]) if classes else datasets.Value("int64")
    columns = {image: [pil.fromarray(one) for one in pixels], label: targets}
    features = datasets.Features({image: datasets.Image(), label: kind})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def ten(count: int) -> list[int]:
    return [n % 10 for n in range(count)]


def sorted_images(split: Split) -> Tensor:
    """In the order in which they were written, which their labels 0..9 of `ten(10)` tell."""
    return split.images[split.labels.argsort()]


@pytest.mark.parametrize(("image", "label", "sub"), [("img", "label", ""), ("image", "fine_label", "cifar10/")])
def test_parquet_folder(image: str, label: str, sub: str, tmp_path: Path) -> None:
    train, test = pictures(10), pictures(11)
    write_parquet(tmp_path / f"{sub}train.parquet", train, ten(10), image, label)
    write_parquet(tmp_path / f"{sub}test.parquet", test, ten(11), image, label)
    data = read("cifar10", path=str(tmp_path), augment=True)
    assert torch.equal(sorted_images(data.train), as_tensor(train))
    assert torch.equal(data.test.images, as_tensor(test))
    assert data.test.labels.tolist() == ten(11)
    assert data.class_names[:2] == ("airplane", "automobile")
    assert data.augment == Augment(padding=4, flip=True)
    assert data.mean == pytest.approx((train / 255).mean((0, 1, 2)).tolist())
    assert data.std == pytest.approx((train / 255).std((0, 1, 2)).tolist())


def test_smaller_images_are_averages(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", pictures(10), ten(10), "img", "label")
    data = read("cifar10", path=str(tmp_path), image_size=16, augment=True)
    blocks = as_tensor(pictures(10)).double().unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert (sorted_images(data.train) - blocks).abs().max() <= 0.5
    assert data.test.images.shape == (10, 3, 16, 16) and data.augment == Augment(padding=2, flip=True)
    assert read("cifar10", path=str(tmp_path), image_size=32).train.images.shape == (10, 3, 32, 32)


def test_parquet_names_its_classes_and_comes_in_pieces(tmp_path: Path) -> None:
    for piece in range(2):
        for part in ("train", "test"):
            path = tmp_path / f"{part}-0000{piece}-of-00002.parquet"
            write_parquet(path, pictures(10), ten(10), "img", "fine_label", classes=100)
    data = read("cifar100", path=str(tmp_path))
    assert (len(data.train), len(data.test), data.classes) == (20, 20, 100)
    assert data.class_names[99] == "kind 99"


def test_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"cifar10/{part}.parquet", pictures(10), ten(10), "img", "label")
    monkeypatch.setenv("TOST_DATA", str(tmp_path))
    assert len(read("cifar10").train) == 10
    monkeypatch.delenv("TOST_DATA")
    assert refused_of("cifar10") == (
        "data.path: expected a folder, parquet file or Hub id for 'cifar10', got None; "
        "give one, or set TOST_DATA to a folder that holds cifar10/"
    )


def test_one_parquet_file_loses_its_last_sixth(tmp_path: Path) -> None:
    pixels = pictures(60)
    write_parquet(tmp_path / "all.parquet", pixels, ten(60), "img", "label")
    data = read("cifar10", path=str(tmp_path / "all.parquet"))
    assert (len(data.train), len(data.test)) == (50, 10)
    assert torch.equal(data.test.images, as_tensor(pixels[50:]))
    write_parquet(tmp_path / "sorted.parquet", pixels, sorted(ten(60)), "img", "label")
    assert refused_of("cifar10", path=str(tmp_path / "sorted.parquet")) == (
        f"data.path: expected the same classes in a file's last sixth as before it, "
        f"got '{tmp_path}/sorted.parquet'; "
        "shuffle its rows, or give a folder with train.parquet and test.parquet"
    )


def test_parquet_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "all.parquet", pictures(60), ten(60), "img", "label")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    silent = pytest.importorskip("datasets").utils.are_progress_bars_disabled
    before = silent()
    read("cifar10", path=str(tmp_path / "all.parquet"))
    assert list(scratch.iterdir()) == []
    assert silent() == before


def test_wrong_parquet(tmp_path: Path) -> None:
    def one_file(pixels: Any, targets: list[int], image: str = "img", label: str = "label", **options: int) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        write_parquet(path, pixels, targets, image, label, **options)
        return refused_of("cifar10", path=str(path)).removeprefix("data")

    assert one_file(pictures(12), [1] * 12, image="picture") == (
        ".path: expected a column img or image, got ['picture', 'label']; rename it"
    )
    assert one_file(pictures(12), [1] * 12, label="y") == (
        ".path: expected a column label or fine_label, got ['img', 'y']; rename it"
    )
    assert one_file(pictures(12), [10] * 12) == (": expected labels in 0..9, got '10..10'; is it another data set?")
    assert one_file(pictures(12), [1] * 12, classes=100) == (
        ".path: expected 10 classes for 'cifar10', got 100; is it another data set?"
    )
    mixed = [*pictures(6, side=8), *pictures(6, side=9)]
    assert one_file(mixed, [1] * 12) == (
        ".path: expected all images (8, 8, 3) like the first, got (9, 9, 3); resize image 6"
    )
    assert one_file(pictures(5), [1] * 5) == (
        ".path: expected 6 images or more, to cut a sixth off, got 5; give a folder with test.parquet"
    )
    assert one_file([], []).startswith(".path: expected parquet files, got ['")


def test_wrong_paths(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no parquet")
    said = refused_of("cifar10", path=str(broken))
    assert said.startswith(f"data.path: expected parquet files, got ['{broken}']; fetch them again (")
    (tmp_path / "data.zip").touch()
    assert refused_of("cifar10", path=str(tmp_path / "data.zip")) == (
        f"data.path: expected a .parquet file, got '{tmp_path}/data.zip'; or give the folder it lies in"
    )
    assert refused_of("cifar100", path=str(tmp_path)) == (
        f"data.path: expected train.parquet and test.parquet, or cifar-100-python/, there or in cifar100/, "
        f"got '{tmp_path}'; correct it"
    )
    assert refused_of("cifar10", path="/no/such/folder") == (
        "data.path: expected a folder or file that exists, or a Hub id owner/name, got '/no/such/folder'; correct it"
    )


def test_unreadable_image_in_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cases = [
        ({"bytes": b"no image", "path": None}, "an image that can be read, got 'image 0'; remove or replace it"),
        ({"bytes": None, "path": "/etc/hostname"},
         "images inside the parquet file, got 'the path /etc/hostname'; save the table with their bytes"),
    ]  # fmt: skip
    for number, (image, message) in enumerate(cases):
        path = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_dict({"img": [image], "label": [0]}).to_parquet(str(path))
        for part in ("train", "test"):
            (tmp_path / f"{part}.parquet").write_bytes(path.read_bytes())
        assert refused_of("cifar10", path=str(tmp_path)) == f"data.path: expected {message}"


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "x.parquet", pictures(10), ten(10), "img", "label", classes=10)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), cache_dir=str(tmp_path))
    asked = []

    def fetch(name: str) -> dict[str, Any]:
        asked.append(name)
        if name == "no/data":
            raise ConnectionError("no network\nand more")
        return {"train": table["train"], "test": table["train"].select(range(0 if name == "no/rows" else 10))}

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    monkeypatch.chdir(tmp_path)
    data = read("cifar10", path="uoft-cs/cifar10")
    assert data.class_names[9] == "kind 9"
    assert refused_of("cifar10", path="no/rows") == ("data.path: expected images, got 0; is the file complete?")
    assert refused_of("cifar10", path="no/data") == (
        "data.path: expected a path that exists, or a Hub data set with train and test, got 'no/data'; "
        "correct it (ConnectionError: no network and more)"
    )
    assert asked == ["uoft-cs/cifar10", "no/rows", "no/data"]


def write_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> np.ndarray:
    """Small files like the published ones, for which torchvision is told to expect these checksums."""
    dataset = getattr(pytest.importorskip("torchvision.datasets"), name)
    pixels, label = pictures(30), "labels" if name == "CIFAR10" else "fine_labels"
    folder.mkdir(parents=True)

    def write(file: str, content: dict[str, Any]) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def batch(file: str, part: slice) -> list[str]:
        return write(file, {"data": pixels[part].transpose(0, 3, 1, 2).reshape(-1, 3072), label: ten(30)[part]})

    names = [f"kind {n}" for n in range(10 if name == "CIFAR10" else 100)]
    meta = write("some.meta", {"names": names})
    monkeypatch.setattr(dataset, "train_list", [batch("one", slice(0, 10)), batch("two", slice(10, 20))])
    monkeypatch.setattr(dataset, "test_list", [batch("test", slice(20, 30))])
    monkeypatch.setattr(dataset, "meta", {"filename": meta[0], "key": "names", "md5": meta[1]})
    return pixels


@pytest.mark.parametrize(("name", "sub"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_torchvision_folder(name: str, sub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_pickles(tmp_path / name / sub, monkeypatch, name.upper())
    for path in (tmp_path, tmp_path / name, tmp_path / name / sub):
        data = read(name, path=str(path))
        assert rows(data.train) == rows(Split(as_tensor(pixels[:20]), torch.arange(20)))
        assert torch.equal(data.test.images, as_tensor(pixels[20:]))
        assert data.test.labels.tolist() == ten(10)
        assert data.class_names[3] == "kind 3"


def test_altered_pickles_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_pickles(folder, monkeypatch, "CIFAR10")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    (folder / "two").write_bytes(pickle.dumps(Trap()))
    assert refused_of("cifar10", path=str(tmp_path)) == (
        f"data.path: expected torchvision's CIFAR10, all files with their published checksums, "
        f"got '{folder}'; fetch it again"
    )
    assert not (tmp_path / "sprung").exists()


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 8), suffix: str = ".png") -> None:
    pil = pytest.importorskip("PIL.Image")
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            colour = (50 * number, image, 255)
            pil.new("RGB", size, colour).save(root / name / f"{image}{suffix}")


@pytest.mark.parametrize("held", ["test", "val"])
def test_image_folder(held: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folder(tmp_path / held, {"cat": 1, "dog": 2}, suffix=".JPG")
    (tmp_path / "train/cat/notes.txt").touch()
    (tmp_path / "train/.cache").mkdir()
    data = read("folder", path=str(tmp_path), image_size=16, augment=True)
    assert data.train.images.shape == (5, 3, 16, 16)
    assert data.test.labels.tolist() == [0, 1, 1]
    assert data.class_names == ("cat", "dog")
    assert data.augment == Augment(padding=2, flip=True)
    # Red tells the class and green the image, so what was written is what is read.
    seen = sorted(zip(data.train.labels.tolist(), data.train.images[:, :2, 5, 5].tolist(), strict=True))
    assert seen == [(0, [0, 0]), (0, [0, 1]), (0, [0, 2]), (1, [50, 0]), (1, [50, 1])]


def test_image_folder_without_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 20, "dog": 10, "emu": 2})
    data = read("folder", path=str(tmp_path))
    assert data.train.images.shape == (26, 3, 32, 32)
    assert torch.bincount(data.test.labels).tolist() == [3, 2, 1]
    assert not rows(data.train) & rows(data.test)
    assert torch.equal(data.test.images, read("folder", path=str(tmp_path)).test.images)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    for name, mode, colour in (("a", "L", 7), ("b", "RGBA", (1, 2, 3, 0))):
        for part in ("train", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            pil.new(mode, (32, 32), colour).save(tmp_path / part / name / "1.png")
    data = read("folder", path=str(tmp_path))
    assert data.test.images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_a_flat_image_still_normalises(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 2})
    data = read("folder", path=str(tmp_path))
    assert data.std[2] == 1.0
    batches = Loader(data.train, 2, seed=0, shuffle=True, augment=None, mean=data.mean, std=data.std)
    assert all(images.isfinite().all() for images, _ in batches)


def test_wrong_image_folders(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    root = tmp_path / "images"
    where = re.escape(str(root))

    def said(expected: str) -> None:
        assert re.fullmatch(f"data.path: expected {expected}", refused_of("folder", path=str(root)))

    assert refused_of("folder") == (
        "data.path: expected a folder of images, got None; give one that holds a folder per class"
    )
    said(f"a folder of images, got '{where}'; give one that holds a folder per class")
    write_folder(root, {"cat": 3})
    said(f"2 class folders or more in {where}, got \\['cat'\\]; add them")
    write_folder(root, {"dog": 1})
    said(f"2 images or more per class, one each to train and to test on, got '{where}/dog'; add some")
    (root / "emu").mkdir()
    said(rf"images \(\.bmp, .*\.webp\), got '{where}/emu'; add some")
    write_folder(root / "train", {"cat": 2, "dog": 2})
    said(f"test/ or val/ beside train/, got '{where}'; add one")
    write_folder(root / "test", {"cat": 2, "emu": 2})
    said(f"the same classes in train/ and test/, got 'dog'; add it to {where}/test")
    write_folder(root / "test", {"dog": 2})
    said(f"the same classes in train/ and test/, got 'emu'; add it to {where}/train")


@pytest.mark.parametrize("content", [b"", b"no image", "cut short"])
def test_unreadable_image_is_named(content: bytes | str, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    if isinstance(content, str):
        buffer = io.BytesIO()
        pil.fromarray(pictures(1)[0]).save(buffer, "png")
        content = buffer.getvalue()[:400]
    bad = tmp_path / "dog/1.png"
    bad.write_bytes(content)
    assert refused_of("folder", path=str(tmp_path)) == (
        f"data.path: expected an image that can be read, got '{bad}'; remove or replace it"
    )


# The real CIFAR-10


def test_real_cifar10_test_images(cifar10: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    data = read("cifar10", path=str(cifar10 / "test.parquet"), validation=34)
    assert (len(data.train), len(data.validation), len(data.test)) == (8300, 34, 1666)
    assert data.class_names[0] == "airplane"
    assert (
        torch.bincount(torch.cat([data.train.labels, data.validation.labels, data.test.labels])).tolist() == [1000] * 10
    )
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.01)
    assert data.std == pytest.approx((0.247, 0.243, 0.261), abs=0.01)


@pytest.mark.long
def test_real_cifar10(cifar10: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    data = read("cifar10", path=str(cifar10.parent), validation=5000)
    assert data.train.images.shape == (45000, 3, 32, 32)
    assert torch.bincount(data.validation.labels).tolist() == [500] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
