"Data: subsets, folders, archives, CIFAR and Tiny ImageNet in their own formats, and what goes wrong with each."

import gzip
import hashlib
import io
import os
import pickle
import shutil
import stat
import tarfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100

import dainv.data
import dainv.folders
from dainv.archives import Archive
from dainv.data import ImageData, balanced_subset, load_data, located
from dainv.folders import check_memory, read_image

ARCHIVE = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "cifar10-jpeg.tar.xz"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    "Every test has a data folder of its own, and no network."
    folder = tmp_path / "data"
    monkeypatch.setenv("DAINV_DATA", str(folder))

    def offline(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    return folder


@pytest.fixture
def small_spirograph(monkeypatch):
    "The embedded set with few images, to save the seconds of drawing it."
    full = dainv.data.spirograph_classes
    monkeypatch.setattr(dainv.data, "spirograph_classes", lambda size=32: full(n_train=200, n_test=50, size=size))


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def random_pixels(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_folder(root: Path, classes=("cat", "ant", "bee"), train=4, test=2, side=8) -> dict[str, np.ndarray]:
    "A folder of PNG files; relative path -> pixels."
    made = {}
    for half, n in (("train", train), ("test", test)):
        for name in classes:
            for i in range(n):
                path = f"{half}/{name}/{i}.png"
                made[path] = random_pixels(side, side, 3, seed=len(made))
                save(root / path, made[path])
    return made


# --- subsets ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 5), data=st.data())
def test_subsets_are_balanced_nested_and_repeatable(labels, seed, data):
    labels = torch.tensor(labels)
    n = data.draw(st.integers(1, len(labels)))
    chosen = balanced_subset(labels, n, seed)
    assert len(chosen) == len(set(chosen.tolist())) == n
    assert chosen.tolist() == sorted(chosen.tolist()) == balanced_subset(labels, n, seed).tolist()
    assert set(balanced_subset(labels, n - 1, seed).tolist()) < set(chosen.tolist())
    taken, there = labels[chosen].bincount(minlength=5), labels.bincount(minlength=5)
    for a in range(5):
        for b in range(5):
            # A class may lag behind another one by more than an image only when it is used up.
            assert taken[a] >= taken[b] - 1 or taken[a] == there[a]


def test_subsets_differ_by_seed_and_favour_no_class():
    labels = torch.arange(10).repeat_interleave(50)
    chosen = [tuple(balanced_subset(labels, 25, seed).tolist()) for seed in range(100)]
    assert len(set(chosen)) == 100
    extra = torch.stack([labels[list(c)].bincount(minlength=10) - 2 for c in chosen]).sum(0)
    assert extra.sum() == 500 and extra.min() > 25 and extra.max() < 75  # 50 expected for each class
    positions = torch.tensor(chosen) % 50
    assert 22 < positions.float().mean() < 27


def test_sizes_and_classes_of_the_embedded_set(small_spirograph):
    everything = load_data("spirograph")
    assert len(everything.train) == 200 and len(everything.test) == 50 and len(everything.classes) == 10
    assert everything.train.images.dtype == torch.uint8 and everything.train.images.shape[1:] == (3, 32, 32)
    assert everything.train.labels.dtype == torch.int64
    assert (everything.name, everything.title) == ("spirograph", "Spirograph classes")
    part = load_data("spirograph", train_size=12, test_size=4, classes=[3, everything.classes[1]])
    assert part.classes == [everything.classes[3], everything.classes[1]]
    assert part.train.labels.bincount().tolist() == [6, 6] and part.test.labels.bincount().tolist() == [2, 2]
    threes = everything.train.images[everything.train.labels == 3]
    for image in part.train.images[part.train.labels == 0]:
        assert (threes == image).flatten(1).all(1).any()


def test_seed_chooses_the_subset_not_the_drawings(small_spirograph):
    assert load_data("spirograph", seed=1).fingerprint == load_data("spirograph").fingerprint
    assert (
        load_data("spirograph", seed=1, train_size=20).fingerprint != load_data("spirograph", train_size=20).fingerprint
    )


def test_fingerprint_covers_pixels_labels_and_class_names(data_folder):
    root = data_folder / "set"
    make_folder(root)
    prints = [load_data("folder", root).fingerprint]
    (root / "train/cat").rename(root / "train/dog")
    (root / "test/cat").rename(root / "test/dog")
    prints.append(load_data("folder", root).fingerprint)
    (root / "train/ant/0.png").rename(root / "train/dog/9.png")
    prints.append(load_data("folder", root).fingerprint)
    save(root / "test/bee/0.png", random_pixels(8, 8, 3, seed=99))
    prints.append(load_data("folder", root).fingerprint)
    prints.append(load_data("folder", root, classes=["bee", "ant"]).fingerprint)
    assert len(set(prints)) == 5


@pytest.mark.parametrize("option", ["train_size", "test_size"])
@pytest.mark.parametrize("value", [201, -1, 0.5, "10"])
def test_impossible_sizes(small_spirograph, option, value):
    with pytest.raises(ValueError, match=f"{option}="):
        load_data("spirograph", **{option: value})


@pytest.mark.parametrize("wanted", [["3 lobs"], [10], [-1], [0, 0], [1.5]])
def test_impossible_classes(small_spirograph, wanted):
    with pytest.raises(ValueError, match=f"classes: .*{wanted[0]}"):
        load_data("spirograph", classes=wanted)


def test_unknown_class_lists_the_classes(data_folder):
    make_folder(data_folder / "set")
    with pytest.raises(ValueError, match="'bea' is not a class; did you mean 'bee'"):
        load_data("folder", "set", classes=["bea"])


@pytest.mark.parametrize(
    "name, hint", [("cifar-10", "'cifar10'"), ("spirografh", "'spirograph'"), ("mnist", "known: auto, sp")]
)
def test_unknown_data_set(name, hint):
    with pytest.raises(ValueError, match=f"{name}.*{hint}"):
        load_data(name)


def test_to_moves_both_halves(data_folder):
    make_folder(data_folder / "set")
    moved = load_data("folder", "set").to("meta")
    assert isinstance(moved, ImageData) and moved.classes == ["ant", "bee", "cat"]
    assert {t.device.type for s in (moved.train, moved.test) for t in (s.images, s.labels)} == {"meta"}


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_gives_the_pixels_in_the_order_of_the_names(data_folder):
    made = make_folder(data_folder / "my set")
    data = load_data("folder", "my set")
    assert data.classes == ["ant", "bee", "cat"] and data.title == "my set" and data.name == "folder"
    assert load_data("folder", "my set", title="Animals").title == "Animals"
    for half, split in (("train", data.train), ("test", data.test)):
        paths = sorted(p for p in made if p.startswith(half))
        assert split.labels.tolist() == [data.classes.index(p.split("/")[1]) for p in paths]
        assert torch.equal(split.images, torch.from_numpy(np.stack([made[p] for p in paths])).permute(0, 3, 1, 2))


def test_many_images_keep_their_places(data_folder):
    "More images than one thread takes at a time."
    rng = np.random.default_rng(1)
    for i in range(300):
        save(data_folder / f"set/train/a/{i:03}.png", np.full((4, 4, 3), rng.integers(0, 256), np.uint8))
    save(data_folder / "set/test/a/0.png", np.zeros((4, 4, 3), np.uint8))
    images = load_data("folder", "set").train.images
    rng = np.random.default_rng(1)
    assert images[:, 0, 0, 0].tolist() == [rng.integers(0, 256) for _ in range(300)]


def test_grey_palette_and_transparent_images_become_rgb(data_folder):
    root, pixels = data_folder / "set", random_pixels(6, 6)
    save(root / "train/a/grey.png", pixels)
    save(root / "train/a/rgba.png", random_pixels(6, 6, 4))
    Image.fromarray(pixels).convert("P").save(root / "train/a/palette.gif")
    save(root / "test/a/upper.JPG", random_pixels(6, 6, 3), format="JPEG")
    data = load_data("folder", "set")
    assert data.train.images.shape == (3, 3, 6, 6) and len(data.test) == 1
    assert torch.equal(data.train.images[0], torch.from_numpy(pixels).expand(3, 6, 6))
    assert torch.equal(data.train.images[2], torch.from_numpy(random_pixels(6, 6, 4)[..., :3]).permute(2, 0, 1))


def test_sixteen_bit_images_are_refused_not_clipped(data_folder):
    make_folder(data_folder / "set", ["a"])
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(data_folder / "set/train/a/deep.png")
    with pytest.raises(ValueError, match="deep.png .*8 bits"):
        load_data("folder", "set")


def test_other_files_and_hidden_files_are_no_images(data_folder):
    make_folder(data_folder / "set")
    for extra in ("train/.DS_Store", "train/cat/notes.txt", "train/cat/._0.png", "train/.cache/x.png", "readme.md"):
        (data_folder / "set" / extra).parent.mkdir(exist_ok=True)
        (data_folder / "set" / extra).write_text("no image")
    with pytest.warns(UserWarning, match=r"1 files are left out.*\.txt \(1\), such as .*set/train/cat/notes\.txt"):
        assert len(load_data("folder", "set").train) == 12


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b"", lambda b: b"<html>", lambda b: b[:60] + b"\0" * 40 + b[100:]]
)
def test_a_broken_image_is_named(data_folder, damage):
    make_folder(data_folder / "set", side=16)
    broken = data_folder / "set/test/bee/1.png"
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(ValueError, match=r"set/test/bee/1\.png cannot be read"):
        load_data("folder", "set")
    assert not list(data_folder.glob("cache/*"))


def test_a_different_size_is_named_and_size_resizes(data_folder):
    make_folder(data_folder / "set")
    save(data_folder / "set/test/bee/7.png", np.full((10, 20, 3), 200, np.uint8))
    with pytest.raises(ValueError, match=r"test/bee/7\.png is 20x10.*8x8.*`size`"):
        load_data("folder", "set")
    data = load_data("folder", "set", size=6)
    assert data.train.images.shape[1:] == (3, 6, 6) and (data.test.images == 200).flatten(1).all(1).sum() == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda r: (r / "train").rename(r / "training"), FileNotFoundError, "no folder 'train'"),
        (lambda r: (r / "test").rename(r / "testing"), FileNotFoundError, "no folder 'test'"),
        (lambda r: [p.unlink() for p in (r / "train/ant").iterdir()], ValueError, "train/ant holds no images"),
        (lambda r: [p.unlink() for p in (r / "test/cat").iterdir()], ValueError, "test/cat holds no images"),
        (lambda r: (r / "test/dog").mkdir(), ValueError, "class 'dog' is only in test/"),
        (lambda r: (r / "train/dog").mkdir(), ValueError, "class 'dog' is only in train/"),
        (lambda r: (r / "train").rename(r / "x") and (r / "train").mkdir(), ValueError, "train holds no folders"),
    ],
)
def test_incomplete_folders(data_folder, change, error, message):
    make_folder(data_folder / "set")
    change(data_folder / "set")
    with pytest.raises(error, match=message):
        load_data("folder", "set")


def test_missing_roots(data_folder):
    with pytest.raises(ValueError, match="needs the folder"):
        load_data("folder")
    with pytest.raises(FileNotFoundError, match=f"{data_folder}/nowhere"):
        load_data("folder", "nowhere")
    for name, place in (("tinyimagenet", "tiny-imagenet-200"), ("imagenet", "imagenet")):
        with pytest.raises(FileNotFoundError, match=f"{data_folder}/{place}"):
            load_data(name)


def test_root_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_folder(tmp_path / "home/pictures/set")
    assert len(load_data("folder", "~/pictures/set").test) == 6


def test_val_serves_as_test(data_folder):
    make_folder(data_folder / "set")
    (data_folder / "set/test").rename(data_folder / "set/val")
    assert len(load_data("folder", "set").test) == 6


def test_nested_folders_and_rare_endings_are_read(data_folder):
    root, value = data_folder / "set", iter(range(20))
    names = [
        "0.png",
        "more/0.png",
        "more/deep/1.PNG",
        "x.jfif",
        "y.jpe",
        "z.avif",
        "w.tga",
        "u.JPEG",
        "v.webp",
        "s.tif",
    ]
    kinds = {"jfif": "JPEG", "jpe": "JPEG"}
    for half in ("train", "test"):
        for name in names:
            pixels = np.full((8, 8, 3), 10 * (next(value) % 10), np.uint8)
            save(root / half / "a" / name, pixels, format=kinds.get(name.rsplit(".")[-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data("folder", "set")
    expected = [10 * names.index(name) for name in sorted(names)]
    assert (data.train.images.float().mean((1, 2, 3)) - torch.tensor(expected)).abs().max() < 3
    assert torch.equal(data.test.labels, torch.zeros(10).long())


def test_what_is_left_out_is_counted_and_named(data_folder):
    make_folder(data_folder / "set")
    for extra in (
        "train/cat/a.heic",
        "test/cat/deep/b.heic",
        "train/ant/c.psd",
        "train/loose.png",
        "train/cat/Thumbs.db",
    ):
        (data_folder / "set" / extra).parent.mkdir(exist_ok=True)
        (data_folder / "set" / extra).write_text("x")
    with pytest.warns(UserWarning, match=r"4 files are left out.*\.heic \(2\), .png \(1\), .psd \(1\)"):
        assert len(load_data("folder", "set").train) == 12
    for path in (data_folder / "set/train/ant").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"train/ant holds no images .*the files in it are \.psd \(1\)"):
        load_data("folder", "set")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_as_their_camera_has_noted(data_folder, orientation, ending):
    pixels = np.kron(random_pixels(3, 4, 3), np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for half in ("train", "test"):
        save(
            data_folder / f"set/{half}/a/0.{ending}",
            pixels,
            exif=exif,
            **({"lossless": True} if ending == "webp" else {}),
        )
    with Image.open(data_folder / f"set/train/a/0.{ending}") as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = load_data("folder", "set").train.images[0].permute(1, 2, 0).numpy()
    assert found.shape == shown.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert np.array_equal(found, shown)


@pytest.mark.parametrize("side", [0, 6, 8, 20])
def test_squares_from_images_of_any_shape(data_folder, side):
    """The shorter side is resized, and the middle stays: a white bar in the middle of a wide and of a tall image."""
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    for half in ("train", "test"):
        save(data_folder / f"set/{half}/a/wide.png", wide)
        save(data_folder / f"set/{half}/a/tall.png", wide.transpose(1, 0, 2))
    if side == 0:
        with pytest.raises(ValueError, match=r"wide\.png is 24x8.*tall\.png is 8x24.*such as size=8"):
            load_data("folder", "set")
        return
    images = load_data("folder", "set", size=side).train.images
    assert images.shape == (2, 3, side, side) and images[:, :, 1:-1, 1:-1].float().mean() > 250


def test_a_line_of_pixels_is_not_made_into_a_wide_image(tmp_path):
    save(tmp_path / "line.png", np.full((1, 30_000, 3), 7, np.uint8))
    assert (read_image(tmp_path / "line.png", size=64) == 7).all()


def test_pillow_is_given_a_list_of_formats_and_bombs_are_refused(data_folder, monkeypatch):
    make_folder(data_folder / "set")
    (data_folder / "set/train/cat/x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    with pytest.raises(ValueError, match=r"cat/x\.png cannot be read as an image"):
        load_data("folder", "set")
    Image.new("1", (9000, 9000)).save(data_folder / "set/train/cat/x.png")
    with pytest.raises(ValueError, match=r"cat/x\.png .*9000x9000 are more than"):
        load_data("folder", "set")
    Image.new("1", (20000, 20000)).save(data_folder / "set/train/cat/x.png")
    with pytest.raises(ValueError, match=r"cat/x\.png cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_data("folder", "set")


def test_links_that_lead_back_are_not_followed(data_folder):
    make_folder(data_folder / "set")
    cat = data_folder / "set/train/cat"
    (cat / "loop").symlink_to(cat, target_is_directory=True)
    (cat / "root").symlink_to(data_folder, target_is_directory=True)
    assert len(load_data("folder", "set").train) == 12
    (cat / "gone.png").symlink_to(data_folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"cat/gone\.png cannot be read \(No such file"):
        load_data("folder", "set")
    (cat / "gone.png").unlink()
    os.mkfifo(cat / "pipe.png")
    with pytest.raises(ValueError, match=r"cat/pipe\.png is named like an image"):
        load_data("folder", "set")


def test_names_of_classes_are_text(data_folder):
    names = ["0", "01", "NA", "nan", "1e5", "true", "cafe\u0301"]
    make_folder(data_folder / "set", names)
    (data_folder / "set/test/cafe\u0301").rename(data_folder / "set/test/caf\u00e9")
    data = load_data("folder", "set")
    assert data.classes == sorted([*names[:-1], "caf\u00e9"]) and len(data.test) == 14
    assert load_data("folder", "set", classes=["NA", "01"]).classes == ["NA", "01"]
    (data_folder / "set/train/caf\u00e9").mkdir()
    with pytest.raises(ValueError, match="name the same class"):
        load_data("folder", "set")


def test_the_folder_that_is_named_is_the_one_that_was_given(data_folder):
    make_folder(data_folder / "set")
    with pytest.raises(
        FileNotFoundError, match=r"set/train has no folder 'train'.*ant, bee, cat.*give the folder above"
    ):
        load_data("folder", "set/train")
    shutil.move(data_folder / "set/train", data_folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"data/set has no folder 'train' of images \(its folders are test\)"):
        load_data("folder", "set")
    make_folder(data_folder / "wrapped/inner/set")
    assert len(load_data("folder", "wrapped").train) == 12


def test_what_no_memory_holds_is_refused_first(data_folder):
    with pytest.raises(ValueError, match=r"7,000 images of 1000000x1000000 pixels take .* GiB, this machine has"):
        load_data("spirograph", size=1_000_000)
    make_folder(data_folder / "set")
    with pytest.raises(ValueError, match=r"18 images of .* GiB"):
        check_memory(18, 10**7, 10**7)


def test_sizes_are_refused_before_anything_is_read(data_folder, monkeypatch):
    make_folder(data_folder / "set")
    monkeypatch.setattr(dainv.folders, "read_image", None)
    for wrong, said in (
        (dict(train_size=13), "there are only 12"),
        (dict(test_size=7), "there are only 6"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**64), "seed="),
        (dict(size=True), "size=True"),
        (dict(train_size=-1), "train_size=-1"),
    ):
        with pytest.raises(ValueError, match=said):
            load_data("folder", "set", **wrong)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    "The files that were decoded."
    opened, read = [], dainv.folders.read_image
    monkeypatch.setattr(dainv.folders, "read_image", lambda path, size=0: opened.append(path) or read(path, size))
    return opened


def cache_file(data_folder) -> Path:
    (found,) = (data_folder / "cache").iterdir()
    return found


def test_cache_is_used_until_the_folder_changes(data_folder, reads):
    root = data_folder / "set"
    make_folder(root)
    first = load_data("folder", "set")
    assert reads
    reads.clear()
    again = load_data("folder", root)
    assert not reads and again.fingerprint == first.fingerprint and torch.equal(again.train.images, first.train.images)

    changes = [
        lambda: save(root / "train/ant/9.png", random_pixels(8, 8, 3, seed=77)),
        lambda: (root / "train/ant/9.png").rename(root / "train/bee/9.png"),
        lambda: os.utime(root / "train/ant/0.png", ns=(5, 5)),
        lambda: (root / "test/ant/0.png").unlink(),
    ]
    for change in changes:
        change()
        load_data("folder", "set")
        assert reads
        reads.clear()
    cache_file(data_folder)  # still one: the stale ones were replaced


def test_a_changed_image_of_the_same_size_is_seen(data_folder):
    path = data_folder / "set/train/a/0.bmp"
    save(path, np.zeros((4, 4, 3), np.uint8))
    save(data_folder / "set/test/a/0.bmp", np.zeros((4, 4, 3), np.uint8))
    assert load_data("folder", "set").train.images.max() == 0
    save(path, np.full((4, 4, 3), 9, np.uint8))
    assert load_data("folder", "set").train.images.min() == 9


def test_equal_names_sizes_and_times_elsewhere_are_not_confused(data_folder):
    for parent, value in (("one", 1), ("two", 2)):
        for half in ("train", "test"):
            path = save(data_folder / parent / f"set/{half}/a/0.bmp", np.full((4, 4, 3), value, np.uint8))
            os.utime(path, ns=(5, 5))
    assert [load_data("folder", f"{p}/set").train.images.max() for p in ("one", "two")] == [1, 2]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "foreign"])
def test_a_damaged_cache_is_rebuilt(data_folder, reads, damage):
    make_folder(data_folder / "set")
    first = load_data("folder", "set")
    path = cache_file(data_folder)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-30] ^= 1
    path.write_bytes(dict(truncated=whole[:-50], emptied=b"", flipped=bytes(flipped), foreign=b"{}" * 50)[damage])
    reads.clear()
    assert load_data("folder", "set").fingerprint == first.fingerprint and reads
    reads.clear()
    assert load_data("folder", "set").fingerprint == first.fingerprint and not reads


def test_sizes_have_caches_of_their_own(data_folder, reads):
    make_folder(data_folder / "set")
    for size in (0, 4, 0, 4):
        reads.clear()
        load_data("folder", "set", size=size)
    assert not reads and len(list((data_folder / "cache").iterdir())) == 2


def test_read_only_source(tmp_path, data_folder, reads):
    root = tmp_path / "library"
    make_folder(root)
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        before = sorted(root.rglob("*"))
        load_data("folder", root)
        reads.clear()
        load_data("folder", root)
        assert not reads and sorted(root.rglob("*")) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_a_warning(data_folder, monkeypatch):
    make_folder(data_folder / "set")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dainv.folders, "save_file", full)
    with pytest.warns(UserWarning, match="not cached.*(No space left|disk is full)"):
        assert len(load_data("folder", "set").train) == 12
    assert not list((data_folder / "cache").iterdir())


# --- archives --------------------------------------------------------------------------------------------------------


def pack(root: Path, archive: Path, top: str = ".") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as z:
            for path in sorted(root.rglob("*")):
                z.write(path, Path(top) / path.relative_to(root))
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tgz', 'gz').replace('tar', '')}") as t:
            t.add(root, top)
    return archive


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("top", [".", "wrapped"])
def test_archives_are_unpacked_once(tmp_path, data_folder, monkeypatch, ending, top):
    make_folder(tmp_path / "set")
    data_folder.mkdir()
    archive = pack(tmp_path / "set", data_folder / f"my.set{ending}", top)
    from_folder = load_data("folder", tmp_path / "set")
    data = load_data("folder", f"my.set{ending}")
    assert data.fingerprint == from_folder.fingerprint and data.title == "my.set"
    monkeypatch.setattr(Archive, "fill", None)
    assert load_data("folder", archive).fingerprint == load_data("folder", "my.set").fingerprint == data.fingerprint


def test_an_archive_is_unpacked_where_python_has_no_filter(tmp_path, data_folder, monkeypatch):
    make_folder(tmp_path / "set")
    archive, extract = pack(tmp_path / "set", tmp_path / "set.tar"), tarfile.TarFile.extractall
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path, members: extract(self, path, members))
    assert load_data("folder", archive).fingerprint == load_data("folder", tmp_path / "set").fingerprint


def test_another_archive_of_the_same_name_is_unpacked_anew(tmp_path):
    for n in (4, 5):
        make_folder(tmp_path / f"set{n}", train=n)
        archive = pack(tmp_path / f"set{n}", tmp_path / "set.tar")
        assert len(load_data("folder", archive).train) == 3 * n


def tar_with(path: Path, member: tarfile.TarInfo, content=b"") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("train/a/0.png"))
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return path


def tar_member(name, kind=tarfile.REGTYPE, link="") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        tar_member("../escaped.txt"),
        tar_member("train/../../escaped.txt"),
        tar_member("/escaped-from-archive.txt"),
        tar_member("train/link", tarfile.SYMTYPE, "../../.."),
        tar_member("train/inner-link", tarfile.SYMTYPE, "a/0.png"),
        tar_member("train/hard", tarfile.LNKTYPE, "train/a/0.png"),
        tar_member("train/pipe", tarfile.FIFOTYPE),
        tar_member("train/device", tarfile.CHRTYPE),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("own_filter", [True, False])  # Python 3.11 has one from its patch 4 on
def test_no_member_of_a_tar_leaves_the_target(tmp_path, data_folder, monkeypatch, member, own_filter):
    if not own_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = tar_with(tmp_path / "evil.tar", member)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"evil\.tar: member .* is refused"):
        load_data("folder", archive)
    new = {p for p in set(tmp_path.rglob("*")) - before if p.suffix not in (".lock", ".digest")}
    assert new == {data_folder, data_folder / "extracted"}
    assert not Path("/escaped-from-archive.txt").exists()


@pytest.mark.parametrize(
    "name, mode",
    [
        ("../x.png", stat.S_IFREG),
        ("/x.png", 0),
        ("..\\x.png", 0),
        ("C:/x", 0),
        ("l", stat.S_IFLNK),
        ("p", stat.S_IFIFO),
    ],
)
def test_no_member_of_a_zip_leaves_the_target(tmp_path, data_folder, name, mode):
    member = zipfile.ZipInfo(name)
    member.external_attr = (mode | 0o644) << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        z.writestr("train/a/0.png", b"")
        z.writestr(member, b"../../x")
    with pytest.raises(ValueError, match=r"evil\.zip: member .* is refused"):
        load_data("folder", tmp_path / "evil.zip")
    assert not [p for p in (data_folder / "extracted").iterdir() if p.is_dir()]
    assert not list(tmp_path.rglob("x.png"))


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("cut", [0.6, 0.0])
def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path, data_folder, ending, cut):
    make_folder(tmp_path / "set", side=32)
    archive = pack(tmp_path / "set", tmp_path / f"cut{ending}")
    archive.write_bytes(archive.read_bytes()[: int(cut * archive.stat().st_size)])
    with pytest.raises(ValueError, match=rf"cut{ending} cannot be unpacked"):
        load_data("folder", archive)
    assert not [p for p in (data_folder / "extracted").iterdir() if p.is_dir()]


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    make_folder(tmp_path / "set", side=32)
    archive = pack(tmp_path / "set", tmp_path / "flip.tar.gz")
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 4
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="flip.tar.gz cannot be unpacked|cannot be read as an image"):
        load_data("folder", archive)


def test_an_interrupted_unpacking_is_done_again(tmp_path, data_folder, monkeypatch):
    make_folder(tmp_path / "set")
    archive = pack(tmp_path / "set", tmp_path / "set.tar")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as after a kill: nobody cleans up
    monkeypatch.setattr(Archive, "admit", lambda *_: 1 / 0)
    with pytest.raises(ValueError):
        load_data("folder", archive)
    assert len([p for p in (data_folder / "extracted").iterdir() if ".part-" in p.name]) == 1
    monkeypatch.undo()
    monkeypatch.setenv("DAINV_DATA", str(data_folder))
    assert len(load_data("folder", archive).train) == 12
    assert not [p for p in (data_folder / "extracted").iterdir() if ".part-" in p.name]


def test_a_full_disk_is_not_blamed_on_the_archive(tmp_path, data_folder, monkeypatch):
    make_folder(tmp_path / "set")
    archive = pack(tmp_path / "set", tmp_path / "set.tar")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Archive, "admit", full)
    with pytest.raises(OSError, match="No space left"):
        load_data("folder", archive)
    assert not [p for p in (data_folder / "extracted").iterdir() if p.is_dir()]


def test_two_at_once_unpack_once(tmp_path, data_folder, monkeypatch):
    make_folder(tmp_path / "set")
    archive = pack(tmp_path / "set", tmp_path / "set.tar")
    unpacked, fill = [], Archive.fill

    def slow(archive, target):
        unpacked.append(target)
        time.sleep(0.3)
        fill(archive, target)

    monkeypatch.setattr(Archive, "fill", slow)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda path: Archive(path).unpacked(), [archive] * 3))
    assert len(unpacked) == len(set(folders)) == 1 and (folders[0] / "train/ant/0.png").exists()


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "set.rar").write_text("")
    with pytest.raises(ValueError, match=r"set\.rar is neither a folder nor an archive"):
        load_data("folder", tmp_path / "set.rar")


def test_archives_of_one_name_size_and_time_are_both_right(tmp_path, data_folder):
    for place, value in (("one", 1), ("two", 2)):
        for half in ("train", "test"):
            path = save(tmp_path / place / f"set/{half}/a/0.bmp", np.full((4, 4, 3), value, np.uint8))
            os.utime(path, ns=(5 * 10**9, 5 * 10**9))
        archive = pack(tmp_path / place / "set", tmp_path / place / "set.tar")
        os.utime(archive, ns=(5, 5))
    archives = [tmp_path / place / "set.tar" for place in ("one", "two")]
    assert archives[0].stat().st_size == archives[1].stat().st_size
    assert [load_data("folder", a).train.images.max() for a in archives] == [1, 2]
    shutil.copy(archives[0], tmp_path / "set.tar")
    load_data("folder", tmp_path / "set.tar")
    assert len([p for p in (data_folder / "extracted").iterdir() if p.is_dir()]) == 2  # the third is the first


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("kind", ["large", "many"])
def test_archives_that_grow_too_much_are_refused(tmp_path, data_folder, ending, kind):
    n, size = (1, 80 * 2**20) if kind == "large" else (40_000, 0)
    archive = tmp_path / f"bomb{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
            for i in range(n):
                z.writestr(f"train/a/{i}.png", bytes(size))
    else:
        with tarfile.open(archive, f"w:{ending[5:]}") as tar:
            for i in range(n):
                member = tarfile.TarInfo(f"train/a/{i}.png")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    if ending == ".zip" and kind == "many":
        pytest.skip("a zip spends more than 16 bytes on a file")
    with pytest.raises(ValueError, match=rf"bomb{ending}: it unpacks to (much more|too many).*if you trust it"):
        load_data("folder", archive)
    assert not [p for p in (data_folder / "extracted").iterdir() if p.is_dir()]


def test_a_sparse_member_is_refused(tmp_path, data_folder):
    head = tarfile.TarInfo("train/a/0.png").tobuf(tarfile.GNU_FORMAT)
    head = bytearray(head)
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[483:495] = b"%011o\0" % 2**32  # the size that it claims
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "sparse.tar").write_bytes(bytes(head) + bytes(10240))
    with pytest.raises(ValueError, match=r"sparse\.tar: member .* is refused"):
        load_data("folder", tmp_path / "sparse.tar")


@pytest.mark.parametrize("damage", ["cut", "header", "checksum"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_members_are_not_lost_without_a_word(tmp_path, data_folder, damage, ending):
    make_folder(tmp_path / "set")
    content = bytearray(pack(tmp_path / "set", tmp_path / "set.tar").read_bytes())
    middle = [m.offset for m in tarfile.open(tmp_path / "set.tar")][12]
    if damage == "cut":
        content = content[:middle]
    elif damage == "header":
        content[middle + 10] ^= 255
    packed = bytearray(gzip.compress(content) if ending == ".tar.gz" else content)
    if damage == "checksum":
        if ending == ".tar":
            pytest.skip("has none")
        packed[-6] ^= 1
    (tmp_path / f"bad{ending}").write_bytes(packed)
    with pytest.raises(ValueError, match=rf"bad{ending} cannot be unpacked"):
        load_data("folder", tmp_path / f"bad{ending}")
    assert not [p for p in (data_folder / "extracted").iterdir() if p.is_dir()]


# --- CIFAR -----------------------------------------------------------------------------------------------------------

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write_cifar(root: Path, monkeypatch, source=CIFAR10, per_batch=20) -> dict[str, tuple[np.ndarray, list[int]]]:
    "Batches in the layout of the original files, and the checksums that belong to them; file -> (pixels, labels)."
    folder, made = root / source.base_folder, {}
    folder.mkdir(parents=True)
    key = "labels" if source is CIFAR10 else "fine_labels"
    n_classes = 10 if source is CIFAR10 else 100

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for halves in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(source, halves):
            pixels = random_pixels(per_batch, 3072, seed=len(made))
            made[name] = pixels, [i % n_classes for i in range(per_batch)]
            sums.append([name, write(name, {"data": pixels, key: made[name][1]})])
        monkeypatch.setattr(source, halves, sums)
    classes = NAMES if source is CIFAR10 else [f"fine{i}" for i in range(100)]
    md5 = write(source.meta["filename"], {source.meta["key"]: classes})
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5})
    return made


def pack_cifar(root: Path, monkeypatch, source=CIFAR10) -> Path:
    "The archive that would have been downloaded, instead of the files."
    archive = root / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / source.base_folder, source.base_folder)
    for path in (root / source.base_folder).iterdir():
        path.unlink()
    (root / source.base_folder).rmdir()
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.mark.parametrize(
    "name, source, title, n", [("cifar10", CIFAR10, "CIFAR-10", 100), ("cifar100", CIFAR100, "CIFAR-100", 100)]
)
def test_cifar(data_folder, monkeypatch, name, source, title, n):
    made = write_cifar(data_folder, monkeypatch, source, per_batch=20 if name == "cifar10" else 100)
    data = load_data(name)
    assert (data.name, data.title, len(data.train), len(data.classes)) == (
        name,
        title,
        n,
        10 if n == 100 and source is CIFAR10 else 100,
    )
    pixels = np.concatenate([made[f][0] for f, _ in source.train_list]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.train.images, torch.from_numpy(pixels)) and data.train.images.is_contiguous()
    assert data.train.labels.tolist() == sum((made[f][1] for f, _ in source.train_list), [])
    assert torch.equal(data.test.images.flatten(1), torch.from_numpy(made[source.test_list[0][0]][0]))
    assert data.test.labels.dtype == torch.int64


def test_cifar_elsewhere_and_in_one_size(data_folder, monkeypatch, tmp_path):
    write_cifar(tmp_path / "elsewhere", monkeypatch)
    assert len(load_data("cifar10", tmp_path / "elsewhere", size=32).test) == 20
    with pytest.raises(ValueError, match="size=64: CIFAR images are 32x32"):
        load_data("cifar10", size=64)


@pytest.mark.parametrize("name, source", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_offline_says_what_to_put_where(data_folder, name, source):
    advice = rf"(?s)could not be downloaded.*Put {source.filename} .*{source.tgz_md5}.* into {data_folder}.*dataset=spirograph"
    with pytest.raises(FileNotFoundError, match=advice):
        load_data(name)


def test_cifar_from_the_archive_that_was_put_there(data_folder, monkeypatch):
    write_cifar(data_folder, monkeypatch)
    expected = load_data("cifar10").fingerprint
    pack_cifar(data_folder, monkeypatch)
    assert load_data("cifar10").fingerprint == expected


def test_cifar_with_a_wrong_checksum(data_folder, monkeypatch):
    write_cifar(data_folder, monkeypatch)
    batch = data_folder / CIFAR10.base_folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"?")

    def download(url, path, **_):
        Path(path).write_bytes(b"an error page")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", download)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    with pytest.raises(ValueError, match=r"(?s)cifar-10-python\.tar\.gz.*is damaged.*Put cifar-10"):
        load_data("cifar10")


def test_missing_and_damaged_files_of_cifar_are_named(data_folder, monkeypatch):
    write_cifar(data_folder, monkeypatch)
    folder = data_folder / CIFAR10.base_folder
    (folder / "data_batch_2").unlink()
    (folder / "test_batch").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"data_batch_2 is missing; \S*test_batch is damaged\. Put"):
        load_data("cifar10")


def test_cifar_with_damaged_names_is_an_error(data_folder, monkeypatch):
    write_cifar(data_folder, monkeypatch)
    (data_folder / CIFAR10.base_folder / "batches.meta").write_bytes(b"?")
    with pytest.raises(ValueError, match="is damaged.*batches.meta is damaged; remove both"):
        load_data("cifar10")


def test_damaged_cifar_is_never_unpickled(data_folder, monkeypatch):
    write_cifar(data_folder, monkeypatch)

    class Evil:
        def __reduce__(self):
            return Path.touch, (data_folder / "executed",)

    (data_folder / CIFAR10.base_folder / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FileNotFoundError):
        load_data("cifar10")
    assert not (data_folder / "executed").exists()


# --- auto ------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_embedded_set_and_never_downloads(data_folder, small_spirograph, monkeypatch, capsys):
    monkeypatch.setattr(CIFAR10, "download", lambda self: pytest.fail("a download was started"))
    data = load_data()
    assert data.name == "spirograph" and data.fingerprint == load_data("spirograph").fingerprint
    assert "spirograph classes, because CIFAR-10 is not in the data folder" in capsys.readouterr().out
    assert not data_folder.exists()


@pytest.mark.parametrize("packed", [False, True])
def test_auto_takes_cifar_that_is_there(data_folder, monkeypatch, capsys, packed):
    write_cifar(data_folder, monkeypatch)
    if packed:
        pack_cifar(data_folder, monkeypatch)
    data = load_data("auto", train_size=30)
    assert (data.name, data.title, len(data.train)) == ("cifar10", "CIFAR-10", 30)
    assert "dataset=auto: CIFAR-10" in capsys.readouterr().out


def test_auto_says_that_cifar_is_damaged(data_folder, small_spirograph, monkeypatch, capsys):
    write_cifar(data_folder, monkeypatch)
    (data_folder / CIFAR10.base_folder / "test_batch").unlink()
    assert load_data().name == "spirograph"
    assert "cannot be used" in capsys.readouterr().out


# --- Tiny ImageNet and ImageNet --------------------------------------------------------------------------------------


def make_tiny(root: Path, n_train=3, n_val=4) -> dict[str, np.ndarray]:
    "The layout of tiny-imagenet-200, with two classes of JPEG files; relative path -> class."
    wnids, made = ["n02", "n01"], {}
    for wnid in wnids:
        for i in range(n_train):
            made[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = wnid
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    for i in range(n_val):
        made[f"val/images/val_{i}.JPEG"] = wnids[i % 2]
    for i, path in enumerate(made):
        save(root / path, np.full((64, 64, 3), 20 * i, np.uint8), quality=95)
    rows = [f"{Path(p).name}\t{w}\t0\t32\t44\t62\n" for p, w in made.items() if p.startswith("val")]
    (root / "val/val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbullfrog, Rana catesbeiana\n")
    save(root / "test/images/test_0.JPEG", np.zeros((64, 64, 3), np.uint8))
    return made


def test_tiny_imagenet(data_folder):
    made = make_tiny(data_folder / "tiny-imagenet-200")
    data = load_data("tinyimagenet")
    assert data.classes == ["goldfish", "bullfrog"] and data.title == "Tiny ImageNet"
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test.labels.tolist() == [1, 0, 1, 0]
    level = {p: 20 * i for i, p in enumerate(made)}
    train = sorted(p for p in made if p.startswith("train"))
    assert data.train.images[:, 0, 5, 5].tolist() == [level[p] for p in train]
    assert data.test.images[:, 2, 9, 9].tolist() == [level[f"val/images/val_{i}.JPEG"] for i in range(4)]


def test_tiny_imagenet_without_words_and_from_its_zip(tmp_path, data_folder):
    make_tiny(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200/words.txt").unlink()
    data_folder.mkdir()
    pack(tmp_path / "tiny-imagenet-200", data_folder / "tiny-imagenet-200.zip", "tiny-imagenet-200")
    data = load_data("tinyimagenet")
    assert data.classes == ["n01", "n02"] and len(data.train) == 6


def test_changed_annotations_are_read_anew(data_folder):
    root = data_folder / "tiny-imagenet-200"
    make_tiny(root)
    assert load_data("tinyimagenet").test.labels.tolist() == [1, 0, 1, 0]
    table = root / "val/val_annotations.txt"
    table.write_text(table.read_text().replace("val_0.JPEG\tn02", "val_0.JPEG\tn01"))
    assert load_data("tinyimagenet").test.labels.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda r: (r / "val/val_annotations.txt").unlink(), FileNotFoundError, "val_annotations.txt does not exist"),
        (lambda r: (r / "val/images/val_1.JPEG").unlink(), ValueError, "val_1.JPEG lacks its image"),
        (lambda r: save(r / "val/images/x.JPEG", np.zeros((64, 64, 3), np.uint8)), ValueError, "x.JPEG lacks"),
        (lambda r: (r / "wnids.txt").write_text("n01 n02 n03"), ValueError, "n03"),
        (
            lambda r: (r / "val/val_annotations.txt").write_text("val_0.JPEG\tn09\t0"),
            ValueError,
            "n09.*does not name a class",
        ),
        (
            lambda r: (r / "train/n01/images").rename(r / "train/n01/i"),
            FileNotFoundError,
            "no folder 'train/n01/images'",
        ),
        (lambda r: (r / "train").rename(r / "t"), FileNotFoundError, "no folder 'train'"),
    ],
)
def test_incomplete_tiny_imagenet(data_folder, change, error, message):
    make_tiny(data_folder / "tiny-imagenet-200")
    change(data_folder / "tiny-imagenet-200")
    with pytest.raises(error, match=message):
        load_data("tinyimagenet")


def test_imagenet_is_resized_and_cropped(data_folder):
    wide = np.zeros((200, 400, 3), np.uint8)
    wide[:, 100:300] = 90  # the central square, which the crop keeps
    for half in ("train", "val"):
        save(data_folder / f"imagenet/{half}/n01/a.png", wide)
        save(data_folder / f"imagenet/{half}/n02/b.png", np.full((300, 150), 60, np.uint8))
    data = load_data("imagenet")
    assert data.train.images.shape == data.test.images.shape == (2, 3, 128, 128) and data.classes == ["n01", "n02"]
    assert (data.train.images[0, :, :, 2:-2] == 90).all() and (data.test.images[1] == 60).all()
    assert load_data("imagenet", size=32).train.images.shape == (2, 3, 32, 32)


# --- sixty thousand photographs --------------------------------------------------------------------------------------


@pytest.mark.archive
@pytest.mark.slow
@pytest.mark.skipif(
    not ARCHIVE.exists(), reason="the JPEG copy of CIFAR-10 (cifar10-jpeg.tar.xz) is not beside the checkout"
)
def test_the_jpeg_copy_of_cifar10(data_folder, record_property, capsys, request):
    request.addfinalizer(lambda: shutil.rmtree(data_folder))  # pytest would keep three copies of the 60,000 files
    seconds = {}

    def timed(what, call):
        start = time.perf_counter()
        result = call()
        seconds[what] = time.perf_counter() - start
        record_property(what, round(seconds[what], 2))
        return result

    folder = timed("unpacking", lambda: located(ARCHIVE))
    data = timed("first read", lambda: load_data("folder", ARCHIVE, title="CIFAR-10 (JPEG copy)"))
    again = timed("cached read", lambda: load_data("folder", ARCHIVE))
    with capsys.disabled():
        print(" " + ", ".join(f"{what} {s:.1f} s" for what, s in seconds.items()), end=" ")

    assert data.train.images.shape == (50_000, 3, 32, 32) and data.test.images.shape == (10_000, 3, 32, 32)
    assert data.classes == NAMES and data.title == "CIFAR-10 (JPEG copy)" and again.title == "cifar10-jpeg"
    assert data.train.labels.bincount().tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    assert again.fingerprint == data.fingerprint
    assert seconds["cached read"] < seconds["first read"] / 2
    for i in (0, 12_345, 49_999):
        label = int(data.train.labels[i])
        path = sorted((folder / "train" / NAMES[label]).iterdir())[i - 5000 * label]
        assert np.array_equal(data.train.images[i].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    mean = data.train.images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.003)  # of the original pixels
    part = load_data("folder", ARCHIVE, train_size=1000, test_size=500, classes=["cat", "dog"])
    assert part.train.labels.bincount().tolist() == [500, 500] and part.test.labels.bincount().tolist() == [250, 250]
