"""Image data: splits that never mix, files read exactly or refused, augmentation, what a batch looks like."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sparsebench.data.image_sources import decode
from sparsebench.data.images import Recipe, use_recipe
from sparsebench.data.labelled import relabel, subset
from tests.helpers import image_settings, tiny_images


def write_idx(folder, prefix, images, labels, packed=True):
    count, height, width = images.shape
    contents = {
        f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x0803, count, height, width) + images.numpy().tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x0801, len(labels)) + labels.numpy().tobytes(),
    }
    for name, content in contents.items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


def random_set(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 9, 9), generator=generator, dtype=torch.uint8)
    return images, (torch.arange(count) % 5).to(torch.uint8)


def idx(folder, **changes):
    return image_settings(name="idx", source="idx", path=str(folder), **changes)


def test_digits_are_split_by_class_and_the_seed_changes_nothing():
    actual, again = image_settings().load(0), image_settings().load(1)
    assert {s.name: len(s) for s in (actual.fit, actual.dev, actual.test)} == {"fit": 1078, "dev": 359, "test": 360}
    assert actual.test.fingerprints() == again.test.fingerprints()
    actual.check_disjoint()


@pytest.mark.parametrize("packed", [True, False])
def test_one_idx_part_is_cut_in_three(tmp_path, packed):
    images, labels = random_set(100)
    write_idx(tmp_path, "t10k", images, labels, packed)
    data = idx(tmp_path).load(0)
    assert [len(s) for s in (data.fit, data.dev, data.test)] == [60, 20, 20]
    seen = torch.cat([s.store.images[s.rows] for s in (data.fit, data.dev, data.test)])
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(images.long().flatten(1).sum(1).tolist())
    assert data.fit.channels == 1 and data.fit.size == 9 and len(data.classes) == 5


def test_its_own_test_part_stays_the_test_part(tmp_path):
    write_idx(tmp_path, "train", *random_set(50, seed=1))
    images, labels = random_set(20, seed=2)
    write_idx(tmp_path, "t10k", images, labels)
    data = idx(tmp_path, dev_share=0.2).load(0)
    assert [len(s) for s in (data.fit, data.dev, data.test)] == [40, 10, 20]
    assert torch.equal(data.test.store.images[data.test.rows][:, 0], images)


def test_an_image_in_two_parts_is_kept_in_test_only(tmp_path):
    train, labels = random_set(50, seed=1)
    test, more = random_set(20, seed=2)
    train[7] = test[3]
    write_idx(tmp_path, "train", train, labels)
    write_idx(tmp_path, "t10k", test, more)
    data = idx(tmp_path).load(0)
    data.check_disjoint()
    assert data.info["repeated_images_left_out"] == 1 and len(data.test) == 20


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path, "train", *random_set(20), packed=False)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is no idx file .* or is cut short"):
        idx(tmp_path).load(0)
    file.write_bytes(b"abc")
    with pytest.raises(ValueError, match="can't be read"):
        idx(tmp_path).load(0)


def test_class_folders(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        for i in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            picture = torch.randint(0, 256, (3, 20, 26), generator=generator, dtype=torch.uint8)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    norm = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": 3}
    settings = image_settings(source="folder", path=str(tmp_path), size=16, augment="resized-crop-flip", **norm)
    data = settings.load(0)
    data.check_disjoint()
    assert data.classes == ["cat", "dog"] and [len(s) for s in (data.fit, data.dev, data.test)] == [12, 4, 4]
    assert data.fit[torch.arange(5)].to("cpu").inputs.shape == (5, 3, 16, 16)
    (batch,) = data.test.batches(None, 10, "cpu")
    assert batch.inputs.shape == (4, 3, 16, 16) and batch.labels.tolist() == [0, 0, 1, 1]


def class_folders(root, count, sizes, classes=("cat", "dog"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = torch.randint(0, 256, (*sizes[i % len(sizes)], 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(root / name / f"{i}.png")


def folder_settings(path, **changes):
    norm = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": 3}
    return image_settings(source="folder", path=str(path), **{"size": 16, **norm, **changes})


def test_images_of_the_right_size_are_left_alone(tmp_path):
    """Others are resized to 256/224 of the size and cropped; the record says which happened to how many."""
    class_folders(tmp_path, 10, [(16, 16), (16, 16), (24, 30), (16, 16), (16, 16)])
    data = folder_settings(tmp_path).load(0)
    (batch,) = data.test.batches(None, 10, "cpu")
    for row, image in zip(data.test.rows.tolist(), batch.inputs, strict=True):
        stored = torch.from_numpy(np.array(Image.open(data.test.store.paths[row]))).permute(2, 0, 1).float() / 255
        if stored.shape[-1] == 16:
            torch.testing.assert_close(image, (stored - 0.5) / 0.5)
    facts = data.describe()
    right = sum(Image.open(data.test.store.paths[i]).size == (16, 16) for i in data.test.rows.tolist())
    assert facts["test"]["left_alone"] == right / len(data.test.rows)
    assert facts["preprocessing"]["resize"] == 18 and facts["preprocessing"]["images_of_this_size"] == "left alone"
    use_recipe(data, Recipe("mine", 16, 20, (0.1,) * 3, (0.2,) * 3))
    (again,) = data.test.batches(None, 10, "cpu")
    assert again.inputs.shape == batch.inputs.shape and data.describe()["preprocessing"]["name"] == "mine"
    alone = [Image.open(data.test.store.paths[i]).size == (16, 16) for i in data.test.rows.tolist()]
    torch.testing.assert_close(again.inputs[alone] * 0.2 + 0.1, batch.inputs[alone] * 0.5 + 0.5)


def test_other_files_are_cropped_only_where_the_sets_own_are(tmp_path):
    class_folders(tmp_path, 1, [(16, 16)])
    class_folders(tmp_path, 1, [(20, 40)], classes=("wide",))
    paths = [str(tmp_path / "cat" / "0.png"), str(tmp_path / "wide" / "0.png")]
    as_stored = torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1)
    data = tiny_images(size=16)
    for split in (data.test, folder_settings(tmp_path).load(0).test):
        actual = split.read_files(paths)
        assert torch.equal(actual[0], as_stored) and actual[1].shape == (3, 16, 16)
    whole = torchvision.transforms.v2.functional.resize(decode(paths[1]), [16, 16], antialias=True)
    assert torch.equal(data.test.read_files(paths)[1], whole)  # sets in memory are never cropped


@pytest.mark.parametrize("layout", ["one of each class", "val alone"])
def test_a_set_can_be_for_evaluation_only(tmp_path, layout):
    root, count = (tmp_path, 1) if layout == "one of each class" else (tmp_path / "val", 4)
    class_folders(root, count, [(16, 16)], classes=("a", "b", "c"))
    data = folder_settings(tmp_path).load(0)
    data.check_disjoint()
    assert [len(s) for s in (data.fit, data.dev, data.test)] == [0, 0, 3 * count] and data.classes == ["a", "b", "c"]
    assert data.fit.channels == 3 and data.fit.size == 16 and data.describe()["fit"]["images"] == 0
    way = "random" if layout == "one of each class" else "class"
    with pytest.raises(ValueError, match=rf"its dev split holds no image .* dataset.cut={way} takes it from the set"):
        next(data.dev.batches(None, 4, "cpu"))
    data = folder_settings(tmp_path, cut=way, dev_share=0.34, test_share=0.33).load(0)
    data.check_disjoint()
    assert all(len(split) for split in (data.fit, data.dev, data.test)) and data.info["split_rule"].startswith(
        {"random": "at random", "class": "stratified by class"}[way]
    )
    again = folder_settings(tmp_path, cut=way, dev_share=0.34, test_share=0.33).load(7)
    assert again.dev.fingerprints() == data.dev.fingerprints()
    assert len(folder_settings(tmp_path, cut="none").load(0).test) == 3 * count


def test_a_set_with_parts_of_its_own_is_not_cut_again(tmp_path):
    for part in ("train", "val"):
        class_folders(tmp_path / part, 2, [(16, 16)], seed=len(part))
    with pytest.raises(ValueError, match="dataset.cut must be auto for a set with parts of its own, got 'random'"):
        folder_settings(tmp_path, cut="random").load(0)


def test_folders_that_are_numbers_are_classes_in_their_order(tmp_path):
    class_folders(tmp_path, 1, [(16, 16)], classes=("0", "2", "10", "1"))
    data = folder_settings(tmp_path).load(0)
    assert data.classes == ["0", "1", "2", "10"]
    names = [data.classes[i] for i in data.test.store.labels.tolist()]
    assert all(Path(path).parent.name == name for path, name in zip(data.test.store.paths, names, strict=True))


def test_labels_take_the_numbers_of_a_network(tmp_path):
    class_folders(tmp_path, 4, [(16, 16)], classes=("b", "a"))
    data = folder_settings(tmp_path).load(0)
    before = [split.store.labels[split.rows].tolist() for split in (data.fit, data.dev, data.test)]
    relabel(data, [5, 3], [str(i) for i in range(7)])
    after = [split.store.labels[split.rows].tolist() for split in (data.fit, data.dev, data.test)]
    assert after == [[[5, 3][i] for i in part] for part in before]  # once, though the splits share their images
    assert data.test.classes == 7 and len(data.classes) == 7


def test_the_size_is_the_weights_where_none_is_set(tmp_path):
    class_folders(tmp_path, 4, [(40, 40)])
    data = folder_settings(tmp_path, size=None, augment="resized-crop-flip").load(0)
    assert data.fit.size == 224 and data.fit.fixed_size is None
    use_recipe(data, Recipe("mine", 24, 30, (0.1,) * 3, (0.2,) * 3))
    (batch,) = data.test.batches(None, 10, "cpu")
    assert batch.inputs.shape[-1] == 24 == data.describe()["size"] == data.fit[torch.arange(2)].images.shape[-1]
    assert Recipe("r", 224, 256, (0,), (1,)).at(112).resize == 128


def test_a_limit_takes_its_share_of_every_class(tmp_path):
    """A set sorted by class: 12 of 120 images are 4 of each class, the same ones every time, part of any larger subset."""
    data = tiny_images(count=360)
    split = data.test
    split.rows = split.rows[split.store.labels[split.rows].argsort(stable=True)]
    few = torch.cat([b.labels for b in split.batches(12, 5, "cpu")])
    assert few.bincount().tolist() == [4, 4, 4]
    labels = split.store.labels[split.rows]
    assert set(subset(labels, 12).tolist()) < set(subset(labels, 50).tolist())
    assert subset(labels, None).tolist() == subset(labels, 500).tolist() == list(range(120))
    uneven = torch.tensor([0] * 80 + [1] * 20)
    for count in (1, 5, 10, 33, 99):
        shares = uneven[subset(uneven, count)].bincount(minlength=2)
        assert int(shares.sum()) == count and abs(int(shares[0]) - 0.8 * count) <= 1


def test_test_batches_are_plain_and_in_order():
    data = tiny_images(augment="shift", shift=2)
    first, second = (torch.cat([b.inputs for b in data.test.batches(None, size, "cpu")]) for size in (5, 32))
    assert torch.equal(first, second) and len(first) == 32
    assert sum(b.numel() for b in data.test.batches(7, 5, "cpu")) == 7
    plain = (data.test.store.images[data.test.rows].float() / 255 - 0.3053) / 0.3761
    torch.testing.assert_close(first, plain)


def test_shift_moves_whole_images_and_follows_the_seed():
    data = tiny_images(augment="shift", shift=1)
    rows = torch.arange(20)
    torch.manual_seed(3)
    one = data.fit[rows].images
    torch.manual_seed(3)
    assert torch.equal(one, data.fit[rows].images)
    assert not torch.equal(one, data.fit[rows].images)
    original = torch.nn.functional.pad(data.fit.store.images[data.fit.rows[rows]], (1,) * 4)
    windows = [original[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    assert all(any(torch.equal(one[i], w[i]) for w in windows) for i in range(20))
    assert not all(torch.equal(one[i], windows[4][i]) for i in range(20))


def test_flip_mirrors_about_half():
    data = tiny_images(augment="shift-flip", shift=0)
    torch.manual_seed(0)
    rows = torch.arange(32)
    actual, original = data.fit[rows].images, data.fit.store.images[data.fit.rows]
    flipped = [torch.equal(actual[i], original[i].flip(-1)) for i in range(32)]
    assert all(f or torch.equal(actual[i], original[i]) for i, f in enumerate(flipped)) and 8 <= sum(flipped) <= 24


def test_grey_images_are_repeated_and_resized_on_request():
    data = tiny_images(size=12, channels=3)
    (batch,) = data.test.batches(4, 4, "cpu")
    assert batch.inputs.shape == (4, 3, 12, 12) and torch.equal(batch.inputs[:, 0], batch.inputs[:, 2])


def test_real_mnist_files(shared_data):
    data = idx(shared_data / "mnist-t10k").load(0)
    assert [len(s) for s in (data.fit, data.dev, data.test)] == [5999, 2000, 2001] and data.fit.size == 28
    data.check_disjoint()
