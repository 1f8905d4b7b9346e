"""Pictures with captions, in the forms that people keep them in."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image

from qzo.diffusion.images import MOST_PIXELS, Picture, pixels, read_pictures, splits_of
from tests.support import pipelines


def listed(path, split="train"):
    return [(picture.caption, picture.data) for picture in read_pictures(path, split)]


def encoded(image):
    held = io.BytesIO()
    image.save(held, format="PNG")
    return Picture("p", "c", held.getvalue())


def test_text_files_and_metadata_say_the_same(pictures, tmp_path):
    found = listed(pictures)
    assert [caption for caption, _ in found[:2]] == ["a blue picture", "a red picture"]
    assert listed(pipelines.save_pictures(tmp_path, captions="metadata")) == found


def test_splits_are_folders(pictures, tmp_path):
    for name in ("train", "validation"):
        shutil.copytree(pictures, tmp_path / name)
    assert splits_of(tmp_path) == {"train": tmp_path / "train", "valid": tmp_path / "validation"}
    assert splits_of(pictures) == {"train": pictures}


def test_a_dataset_on_disk_and_parquet_are_read(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": data, "path": None}, "caption": caption} for caption, data in listed(pictures)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "validation": made.select([0])}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    made.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    for folder in ("one", "two", "hub"):
        splits = splits_of(tmp_path / folder)
        assert listed(splits["train"]) == listed(pictures), folder
        assert set(splits) == ({"train", "valid"} if folder == "two" else {"train"})
    bare = made.remove_columns("caption")
    bare.save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"row 1 of .*: expected a picture .* and a caption .* got the columns image"):
        listed(tmp_path / "bare")


def test_pictures_become_squares_between_minus_one_and_one():
    """The middle of a wide one; transparency is white; a rotated photograph stands upright."""
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (10, 0, 30, 20))
    assert torch.equal(pixels(encoded(wide), 20), torch.ones(3, 20, 20))
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert torch.equal(pixels(encoded(clear), 16), torch.ones(3, 16, 16))
    assert float(pixels(encoded(Image.new("RGB", (16, 16), "black")), 16).max()) == -1
    turned, held = Image.new("RGB", (16, 16), "black"), io.BytesIO()
    turned.paste("white", (0, 0, 16, 8))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(held, format="PNG", exif=exif)
    upright = pixels(Picture("p", "c", held.getvalue()), 16)
    assert float(upright[:, :6].max()) < -0.9
    assert float(upright[:, 10:].min()) > 0.9


@pytest.mark.parametrize(
    ("data", "resolution", "told"),
    [(b"no picture", 16, "it cannot be read"), (None, 64, "it is 16 x 16, less than half of 64")],
)
def test_what_is_no_use_says_why(data, resolution, told):
    picture = encoded(Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match=told):
        pixels(picture._replace(data=data or picture.data), resolution)


def test_pictures_without_captions_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"8 of 8 pictures have no caption, the first is p0.png; give each picture"):
        listed(pipelines.save_pictures(tmp_path / "bare", captions=None))
    folder = shutil.copytree(pictures, tmp_path / "some")
    (folder / "p3.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"1 of 8 pictures have no caption, the first is p3.png"):
        listed(folder)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is not JSON"),
        ('{"file_name": "p0.png"}', 'line 1: expected {"file_name"'),
        ("[1]", "line 1: expected"),
        ('{"file_name": "gone.png", "text": "a"}', "line 1 names 'gone.png', which is no file of"),
        ('{"file_name": "../p0.png", "text": "a"}', "names '../p0.png', which is no file of"),
    ],
)
def test_a_metadata_file_that_cannot_be_read_is_named(tmp_path, line, told):
    folder = pipelines.save_pictures(tmp_path / "in", 1, captions=None)
    shutil.copy(folder / "p0.png", tmp_path)
    (folder / "metadata.jsonl").write_text(line + "\n" + json.dumps({"file_name": "p0.png", "text": "a"}))
    with pytest.raises(ValueError, match=told):
        listed(folder)


def test_no_pictures_at_all(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        listed(tmp_path)
    with pytest.raises(FileNotFoundError, match="no data at"):
        splits_of(tmp_path / "gone")


def test_a_picture_of_absurd_size_is_refused_before_it_is_unpacked(monkeypatch):
    """Some KB of PNG may say any number of pixels."""
    held = io.BytesIO()
    Image.new("1", (1 << 14, 1 + (MOST_PIXELS >> 14))).save(held, "PNG")
    assert len(held.getvalue()) < 1 << 16
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match="16384 x 4097 are more than 67,108,864 pixels"):
        pixels(Picture("p", "c", held.getvalue()), 8)


def test_other_formats_under_the_name_of_a_picture_are_not_read(monkeypatch):
    """Pillow would hand PostScript to Ghostscript, and knows many formats that nobody trains on."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    held = io.BytesIO()
    Image.new("RGB", (16, 16)).save(held, "TIFF")
    for data in (postscript, held.getvalue()):
        with pytest.raises(ValueError, match="it cannot be read"):
            pixels(Picture("p", "c", data), 8)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    pipelines.save_pictures(tmp_path, count=1)
    (tmp_path / "p0.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"p0.txt is not UTF-8"):
        list(read_pictures(tmp_path))
