"""Task image: folders and tables of images, their parts, batches and scores."""

import json
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from images import save_digits, save_resnet, save_vit
from lowdim import models
from lowdim.errors import DataError, MissingExtraError, UnknownNameError
from lowdim.train.decoding import decode
from lowdim.train.head import fit_head
from lowdim.train.images import read_images
from lowdim.train.metrics import METRICS
from lowdim.train.tasks.image import Pixels, image_classification

ACCURACY = METRICS["accuracy"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def processor(vit):
    return models.load_image_processor(str(vit))


@pytest.fixture(scope="module")
def task(processor, digits):
    return image_classification(processor, [digits])


def paint(path, colour, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folder(root, **classes):
    """A folder for each class with so many images; no two are equal."""
    for kind, (name, count) in enumerate(classes.items()):
        for i in range(count):
            paint(root / name / f"{i}.png", (kind, i, 0))
    return root


def test_a_folder_for_each_class(task, digits):
    assert task.classes == tuple(map(str, range(10)))
    assert (task.kind, task.name, task.notes, task.size) == ("image", "digits", (), (16, 16))
    sizes = task.sizes()
    assert sum(sizes.values()) == 200
    assert [round(sizes[name] / 200, 1) for name in ("test", "validation")] == [0.3, 0.1]
    for part in (task.train, task.validation, task.test):
        assert set(part["labels"]) == set(range(10)), "each class in the same proportion"
        for row in part:
            assert task.collate.paths[row["image"]].parent.name == task.classes[row["labels"]]
    places = [row["image"] for part in (task.train, task.validation, task.test) for row in part]
    assert len(set(places)) == 200
    first = task.collate.paths[task.train[0]["image"]]
    assert task.example == f"{first.parent.name}/{first.name}, 8 x 8 pixels, read as 16 x 16 -> '{first.parent.name}'"
    assert task.remarks()[0] == ("data", f"{digits}: each of 10 folders is a class")


def test_a_batch_is_what_the_processor_makes_of_the_files(task, processor):
    rows = [task.train[i] for i in range(3)]
    batch = task.collate(rows)
    assert batch["labels"].tolist() == [row["labels"] for row in rows]
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    with Image.open(task.collate.paths[rows[1]["image"]]) as image:
        resized = numpy.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), numpy.float32)
    want = (resized / 255 - 0.5) / 0.5
    assert torch.allclose(batch["pixel_values"][1], torch.tensor(want).permute(2, 0, 1), atol=1e-6)
    assert torch.equal(task.collate(rows)["pixel_values"], batch["pixel_values"]), "also from what was kept"


def test_memory_for_kept_images_is_bounded(task, processor):
    one = 3 * 16 * 16 * 4
    few = Pixels(task.collate.paths, processor, room=2 * one + 1)
    batches = [few([{"image": i, "labels": 0} for i in range(5)])["pixel_values"] for _ in range(2)]
    assert len(few._kept) == 2
    assert torch.equal(*batches)


def test_scores_and_the_majority_baseline(task):
    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, labels):
            return SimpleNamespace(logits=torch.eye(10)[labels.where(labels < 5, 0)])

    small = [label < 5 for label in task.test["labels"]]
    score = task.score(Says(), task.test, ACCURACY)
    assert score.value == pytest.approx(sum(small) / len(small))
    assert score.values == tuple(float(a or label == 0) for a, label in zip(small, task.test["labels"]))
    constant = task.baseline(task.test, ACCURACY)
    share = task.test["labels"].count(task.classes.index(constant.what[-2])) / len(task.test)
    assert constant.score.value == pytest.approx(share)
    assert "of the images)" in constant.sentence


def test_parts_in_folders_of_their_own(processor, tmp_path):
    folder(tmp_path / "set" / "train", cat=6, dog=6)
    paint(tmp_path / "set" / "val" / "cat" / "x.png", (7, 0, 0))
    paint(tmp_path / "set" / "val" / "dog" / "0.png", (1, 0, 0))  # a training image as well
    paint(tmp_path / "set" / "test" / "dog" / "y.png", (9, 0, 0))
    (tmp_path / "set" / "notes").mkdir()
    task = image_classification(processor, [tmp_path / "set"])
    assert task.sizes() == {"train": 11, "validation": 2, "test": 1}
    assert task.notes == (
        f"{tmp_path / 'set'}: folders notes are no part of train, validation and test and were left out",
        "1 training images are also in a later part (validation, test) and were left out of training",
    )
    paint(tmp_path / "other" / "cat" / "0.png", (0, 3, 0))
    task = image_classification(processor, [tmp_path / "set"], evaluation=tmp_path / "other")
    assert task.sizes() == {"train": 10, "validation": 2, "test": 1}
    assert "the data's own test folder is not used, since --eval names another" in task.notes
    with pytest.raises(DataError, match=r"--eval .*set: it holds several parts; name the folder of one, such as .*set/test"):
        image_classification(processor, [tmp_path / "other"], evaluation=tmp_path / "set")
    paint(tmp_path / "other" / "cow" / "0.png", (0, 4, 0))
    with pytest.raises(DataError, match=r"label 'cow' does not occur in the training data \(classes: cat, dog\)"):
        image_classification(processor, [tmp_path / "set"], evaluation=tmp_path / "other")


def test_equal_images_count_as_one(processor, tmp_path):
    root = folder(tmp_path / "set", cat=6, dog=6)
    shutil.copy(root / "cat" / "0.png", root / "cat" / "copy.png")
    Image.open(root / "cat" / "1.png").save(root / "dog" / "other.bmp")
    task = image_classification(processor, [root])
    assert sum(task.sizes().values()) == 12
    assert task.notes == (
        "2 duplicate images were left out, so that none is in two parts (only equal ones are found, not similar ones)",
        "1 of them have another label than the first, which was kept",
    )
    shutil.copytree(root / "cat", tmp_path / "held" / "cat")
    with pytest.raises(
        DataError, match=r"class 'cat' has 0 images; at least 2 are needed to split the data \(duplicates are left"
    ):
        image_classification(processor, [root], evaluation=tmp_path / "held")


def test_a_table_of_paths(processor, tmp_path):
    folder(tmp_path / "a", x=8)
    rows = [f"a/x/{i}.png,{('no', 'yes')[i % 2]},{i}" for i in range(8)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["picture,answer,note", *rows, "a/x/0.png,,9", ",yes,10"]) + "\n")
    with pytest.raises(UnknownNameError, match=r"which column holds the label"):
        image_classification(processor, [table])
    task = image_classification(processor, [table], label="answer")
    assert task.classes == ("no", "yes")
    assert task.notes[-2:] == (
        f"1 rows of {table} name no image and were left out",
        f"1 rows of {table} have no label and were left out",
    )
    used = task.columns[0]
    assert used.sentence.startswith(
        f"{table}: the path of the image is column 'picture' and the label 'answer' (not used: note)"
    )
    for row in task.train:
        path = task.collate.paths[row["image"]]
        assert task.classes[row["labels"]] == ("no", "yes")[int(path.stem) % 2]
    (tmp_path / "a" / "x" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 10 images are not there, such as 'a/x/3.png'; paths are relative to"):
        image_classification(processor, [table], label="answer")


def test_jsonl_and_columns_that_are_named(tmp_path):
    folder(tmp_path, x=2)
    table = tmp_path / "t.jsonl"
    rows = [{"file_name": f"x/{i}.png", "thumb": "x/0.png", "label": i} for i in range(2)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_images(table).labels == [0, 1]
    assert [path.name for path in read_images(table, text="thumb").paths] == ["0.png", "0.png"]
    table.write_text("".join(json.dumps({"a": r["file_name"], "b": r["thumb"], "label": r["label"]}) + "\n" for r in rows))
    with pytest.raises(
        UnknownNameError, match=r"which column holds the paths of the images. columns 'a', 'b' do; name it with"
    ):
        read_images(table)
    table.write_text('{"words": "no file", "label": 1}\n' * 2)
    with pytest.raises(UnknownNameError, match=r"none has values such as 'cat/1.png'; name it with --text"):
        read_images(table)


def test_what_no_folder_of_images_holds(processor, tmp_path):
    (tmp_path / "flat").mkdir()
    paint(tmp_path / "flat" / "a.png", (1, 2, 3))
    with pytest.raises(DataError, match=r"flat holds 1 images and no folder for each class; put the images of each class into"):
        read_images(tmp_path / "flat")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no file in cat is an image"):
        read_images(tmp_path / "bare")
    with pytest.raises(DataError, match=r"there is only one class"):
        image_classification(processor, [folder(tmp_path / "one", cat=5)])
    with pytest.raises(DataError, match=r"class 'dog' has 2 images; at least 3 are needed to split the data"):
        image_classification(processor, [folder(tmp_path / "few", cat=5, dog=2)])
    with pytest.raises(DataError, match=r"name a folder with a sub-folder for each class, or a table"):
        read_images(tmp_path / "flat" / "a.png")
    root = folder(tmp_path / "odd", cat=2)
    (root / "dog").mkdir()
    (root / "cat" / "list.txt").write_text("x")
    (root / "cat" / ".hidden.png").write_text("x")
    paint(root / "loose.png", (1, 2, 3))
    assert read_images(root).notes == [
        f"1 images directly in {root} are in no class's folder and were left out",
        f"{root}: folders dog hold no image and are no classes",
        f"1 files in {root} are no images (.txt) and were left out",
    ]


def test_the_processor_must_fit_the_model(processor, tmp_path, digits, vit):
    grey = save_vit(tmp_path / "grey", channels=1)
    own = models.load_image_processor(str(grey))
    task = image_classification(own, [digits], channels=1)
    assert task.collate([task.train[0]])["pixel_values"].shape == (1, 1, 16, 16)
    with pytest.raises(DataError, match=r"ViTImageProcessorPil. cannot be used on images of mode L"):
        image_classification(processor, [digits], channels=1)
    with pytest.raises(DataError, match=r"the model reads images of 4 channels; images have 3 .RGB., or 1 .grey."):
        image_classification(processor, [digits], channels=4)
    processor = models.load_image_processor(str(vit))
    processor.size = {"shortest_edge": 16}
    with pytest.raises(DataError, match=r"gives images of several sizes .*set size to a height and a width, or do_center_crop"):
        image_classification(processor, [digits])


def test_a_limit_keeps_every_class(processor, digits):
    task = image_classification(processor, [digits], limit=10)
    assert sorted(task.train["labels"]) == list(range(10))
    with pytest.raises(DataError, match=r"limit must be at least 10"):
        image_classification(processor, [digits], limit=9)


def test_the_checksum_of_data_is_that_of_pixels_and_labels(processor, tmp_path):
    root = folder(tmp_path / "set", cat=5, dog=5)
    first = image_classification(processor, [root])
    assert image_classification(processor, [root]).contents == first.contents
    (root / "cat" / "readme.txt").write_text("more")
    assert image_classification(processor, [root]).contents == first.contents
    paint(root / "cat" / "0.png", (99, 0, 0))
    changed = image_classification(processor, [root]).contents
    assert list(changed) == [str(root)]
    assert changed != first.contents


def test_the_forecast_gets_the_size_of_the_images(task):
    config = SimpleNamespace(image_size=224)
    task.fit_config(config)
    assert config.image_size == 16
    assert task.longest() == 1


@pytest.mark.parametrize("save", [save_vit, save_resnet], ids=["linear", "pooled-and-flattened"])
def test_a_linear_head_starts_as_a_regression(save, tmp_path, task):
    name = str(save(tmp_path / "model"))
    model = models.load_model(name, "image", num_labels=10)
    head = models.head_modules(model, "image")
    before = task.evaluate(model, task.validation, ACCURACY)
    fitted = fit_head(model, head, task)
    assert fitted == pytest.approx(task.evaluate(model, task.validation, ACCURACY))
    assert fitted > before + 0.2


def test_a_model_without_an_image_processor(bert_folder, tmp_path, vit, monkeypatch):
    shutil.copytree(vit, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(UnknownNameError, match=r"its image processor \(preprocessor_config.json\) cannot be read"):
        models.load_image_processor(str(tmp_path / "bare"))
    find = models.processors.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "PIL" else find(name, *more))
    with pytest.raises(MissingExtraError, match=r"reading images needs the package 'pillow': pip install 'lowdim\[image\]'"):
        models.load_image_processor(str(vit))


def test_a_model_of_timm_without_timm(tmp_path, monkeypatch):
    find = models.processors.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "timm" else find(name, *more))
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 10, "model_type": "timm_wrapper"})
    )
    with pytest.raises(MissingExtraError, match=r"needs the package 'timm': pip install 'lowdim\[timm\]'"):
        models.load_config(str(tmp_path))


def test_decoding_for_the_example_is_upright(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").size == (2, 4)


def test_the_head_of_a_model_of_timm_is_within_its_wrapper():
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 2)

        def get_classifier(self):
            return self.fc

    wrapper = torch.nn.Module()
    wrapper.base_model_prefix, wrapper.timm_model = "timm_model", Inner()
    assert models.heads.new_modules(wrapper, ["timm_model.fc.weight", "timm_model.fc.bias"]) == ("timm_model.fc",)
    assert models.heads.new_modules(wrapper, ["timm_model.conv.weight"]) == (), "a missing backbone is an error"
