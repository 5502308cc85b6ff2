"""TFDS without TensorFlow: a data set written here by TFDS's own writer, and mock_data."""

import io
import logging
import sys

import numpy as np
import pytest

from kdjax import data

CLASSES = 4
SIZES = {"train": 60, "test": 12}


def example(split, row):
    rng = np.random.default_rng([len(split), row])
    return rng.integers(0, 256, (6, 5, 3), dtype=np.uint8), row % CLASSES


def png(image):
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    encoded.seek(0)
    return encoded


def write(folder, name="tiny_pictures", varying=False, file_format="array_record"):
    """Has TFDS write the examples; its ready-made AdhocBuilder would need TensorFlow."""
    import tensorflow_datasets as tfds

    shape = (None, None, 3) if varying else (6, 5, 3)
    written = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "row": np.int64,
        }
    )

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=written)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SIZES}

        def _generate_examples(self, split):
            for row in range(SIZES[split]):
                image, label = example(split, row)
                if varying and row % 2:
                    image = image[:-1]
                yield row, {"image": png(image), "label": label, "row": row}

    Builder.name = name
    Builder(data_dir=folder, file_format=file_format).download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    logging.getLogger("absl").setLevel(logging.ERROR)
    path = tmp_path_factory.mktemp("tfds")
    write(path)
    return path


def rows(dataset, split):
    return {image.tobytes() for image in dataset.read(split, raw=True)["image"]}


def test_reads_what_tfds_wrote(folder):
    dataset = data.tfds("tiny_pictures", folder, validation=10)
    assert dataset.shape == (6, 5, 3)
    assert dataset.num_classes == CLASSES
    assert {s: dataset.size(s) for s in dataset.splits} == {
        "train": 50,
        "validation": 10,
        "test": 12,
    }
    expected = {split: [example(split, r) for r in range(SIZES[split])] for split in SIZES}
    assert rows(dataset, "test") == {image.tobytes() for image, _ in expected["test"]}
    assert rows(dataset, "train") | rows(dataset, "validation") == {
        image.tobytes() for image, _ in expected["train"]
    }
    labels = {image.tobytes(): label for image, label in expected["train"]}
    batch = next(iter(dataset.batches("train", 8, raw=True)))
    assert batch["image"].dtype == np.uint8
    assert [labels[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
    assert dataset.read("train")["image"].max() <= 1
    assert "tensorflow" not in sys.modules


def test_same_contract_as_arrays(folder):
    dataset = data.tfds("tiny_pictures", folder)
    columns = {split: dataset.read(split, raw=True) for split in dataset.splits}
    for column in columns.values():
        del column["index"]
    copies = data.arrays(columns)
    ours = dataset.batches("train", 8, seed=3, last="pad")
    theirs = copies.batches("train", 8, seed=3, last="pad")
    for step in (0, 5, 13):
        first, second = ours.at(step), theirs.at(step)
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
    np.testing.assert_array_equal(dataset.labels("train"), copies.labels("train"))
    few = dataset.keep_labels(2)
    assert (few.labels("train") >= 0).sum() == 2 * CLASSES


def test_threads_and_time_change_nothing(folder):
    one = data.tfds("tiny_pictures", folder, threads=1)
    many = data.tfds("tiny_pictures", folder, threads=7)
    first, second = one.read("train"), many.read("train")
    np.testing.assert_array_equal(first["image"], second["image"])
    np.testing.assert_array_equal(first["label"], second["label"])
    assert one.fingerprint("train") == many.fingerprint("train")
    assert one.fingerprint("train") != one.fingerprint("test")


def test_slices_and_other_labels(folder):
    splits = {"train": "train[:50%]", "validation": "train[50%:]", "test": "test"}
    dataset = data.tfds("tiny_pictures", folder, splits=splits, label_key="row", num_classes=60)
    assert [dataset.size(s) for s in splits] == [30, 30, 12]
    both = np.concatenate([dataset.labels("train"), dataset.labels("validation")])
    assert sorted(both) == list(range(60))
    assert dataset.fingerprint("train") != dataset.fingerprint("validation")


def test_prepare_brings_images_to_one_size(folder):
    write(folder, "uneven_pictures", varying=True)
    uneven = data.tfds("uneven_pictures", folder)
    with pytest.raises(ValueError, match="prepare must bring all images to one size"):
        uneven.read("train")
    dataset = data.tfds("uneven_pictures", folder, prepare=lambda image: image[:4, :4])
    assert dataset.shape == (4, 4, 3)
    assert dataset.read("train")["image"].shape == (54, 4, 4, 3)


def test_mock_data():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20):
        dataset = data.tfds("mnist", validation=4)
    assert dataset.shape == (28, 28, 1)
    assert dataset.num_classes == 10
    assert [dataset.size(s) for s in dataset.splits] == [16, 4, 20]
    batch = next(iter(dataset.batches("train", 8)))
    assert batch["image"].shape == (8, 28, 28, 1)
    assert batch["image"].dtype == np.float32
    assert 0 <= batch["label"].min() <= batch["label"].max() <= 9
    assert dataset.fingerprint("train") == dataset.fingerprint("train")
    assert "tensorflow" not in sys.modules


def fails(match, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=match) as caught:
        data.tfds(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_faults_are_one_sentence(folder, tmp_path, monkeypatch):
    fails("name must be a data set of TensorFlow Datasets", "no_such_thing", tmp_path)
    fails(r"prepared as array_record.*download_and_prepare\(\)", "mnist", tmp_path)
    fails("tfds-prepare", "cifar10", tmp_path)
    fails("splits must name splits", "tiny_pictures", folder, splits={"train": "nowhere"})
    fails("no entry 'picture'", "tiny_pictures", folder, image_key="picture")
    fails("no entry 'kind'", "tiny_pictures", folder, label_key="kind")
    fails("num_classes must be given", "tiny_pictures", folder, label_key="row")
    write(folder, "flat_pictures", file_format="parquet")
    assert data.tfds("flat_pictures", folder).size("test") == 12
    fails("whole for parquet", "flat_pictures", folder, splits={"train": "train[:5]"})
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails(r"pip install 'kdjax\[tfds\]'", "tiny_pictures", folder, error=ImportError)
