"""Image files of every kind as the pixels that a model reads."""

import numpy
import pytest
from PIL import Image

from lowdim.errors import DataError
from lowdim.train.decoding import decode, decode_all

RED, BLUE = (200, 30, 10), (10, 30, 200)


def pixels(path, channels=3):
    return numpy.asarray(decode(path, channels)).tolist()


def saved(tmp_path, image, name="a.png", **how):
    image.save(tmp_path / name, **how)
    return tmp_path / name


def two(mode="RGB"):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    return image.convert(mode)


def test_colours_are_kept_and_grey_is_repeated(tmp_path):
    assert pixels(saved(tmp_path, two())) == [[list(RED), list(BLUE)]]
    grey = Image.new("L", (1, 1), 77)
    assert pixels(saved(tmp_path, grey)) == [[[77, 77, 77]]]
    assert pixels(saved(tmp_path, grey), channels=1) == [[77]]
    luma = [round((299 * r + 587 * g + 114 * b) / 1000) for r, g, b in (RED, BLUE)]
    assert pixels(saved(tmp_path, two()), channels=1) == [luma]


def test_one_bit_and_palette(tmp_path):
    assert pixels(saved(tmp_path, Image.new("1", (1, 1), 1))) == [[[255, 255, 255]]]
    assert pixels(saved(tmp_path, two().quantize(2))) == [[list(RED), list(BLUE)]]


def test_transparency_is_dropped_and_told(tmp_path):
    clear = Image.new("RGBA", (1, 1), (*RED, 0))
    assert pixels(saved(tmp_path, clear)) == [[list(RED)]]
    palette = saved(tmp_path, two().quantize(2), "b.png", transparency=0)
    assert pixels(palette) == [[list(RED), list(BLUE)]]
    plain = saved(tmp_path, two(), "c.png")
    assert [each.see_through for each in decode_all([tmp_path / "a.png", palette, plain])] == [True, True, False]


def test_sixteen_bits_become_eight(tmp_path):
    wide = Image.fromarray(numpy.array([[0, 257, 65535, 32896]], numpy.uint16))
    assert pixels(saved(tmp_path, wide), channels=1) == [[0, 1, 255, 128]], "round(v / 257)"
    assert pixels(saved(tmp_path, wide, "a.tif"), channels=1) == [[0, 1, 255, 128]]


def test_numbers_between_0_and_1_become_0_to_255(tmp_path):
    path = saved(tmp_path, Image.fromarray(numpy.array([[0.0, 0.5, 1.0]], numpy.float32)), "a.tif")
    assert pixels(path, channels=1) == [[0, 128, 255]]
    for values in ([[0.0, 3.5]], [[-1.0, 0.0]], [[float("nan"), 0.0]]):
        path = saved(tmp_path, Image.fromarray(numpy.array(values, numpy.float32)), "b.tif")
        with pytest.raises(ValueError, match=r"which tell no black from white; save it with 8 or 16 bits"):
            decode(path)
    path = saved(tmp_path, Image.fromarray(numpy.array([[0, 255]], numpy.int32)), "c.tif")
    with pytest.raises(ValueError, match=r"its numbers are 0 to 255, which tell no black from white"):
        decode(path)


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=100)
    red, green, blue = pixels(path)[0][0]
    assert red > 230
    assert green < 40
    assert blue < 40


def test_a_photo_is_turned_upright(tmp_path):
    sideways = Image.new("RGB", (2, 1))
    exif = sideways.getexif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise
    assert decode(saved(tmp_path, two(), exif=exif)).size == (1, 2)
    assert pixels(tmp_path / "a.png") == [[list(RED)], [list(BLUE)]]


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(path)[0][0] == list(RED)
    assert decode_all([path])[0].animated


def test_equal_pixels_share_a_key_whatever_the_file(tmp_path):
    same = [saved(tmp_path, two(), name) for name in ("a.png", "b.bmp", "c.tif")]
    other = two()
    other.putpixel((0, 0), (*RED[:2], RED[2] + 1))
    turned = saved(tmp_path, two().rotate(90, expand=True), "d.png")
    keys = [each.key for each in decode_all([*same, saved(tmp_path, other, "e.png"), turned])]
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 3


def test_damaged_files_are_named(tmp_path):
    good = saved(tmp_path, Image.new("RGB", (64, 64)), "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    names = ["good.png", "cut.png", "text.png", "empty.png", "page.png"]
    with pytest.raises(DataError) as error:
        decode_all([tmp_path / name for name in names])
    assert str(error.value).startswith("4 of 5 images cannot be read: ")
    assert str(error.value).endswith("; repair or remove them")
    for name in names[1:]:
        assert name in str(error.value)
    assert str(error.value).count("it is no image of a known format") == 3


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    (tmp_path / "b").mkdir()
    path = saved(tmp_path / "b", Image.new("1", (12_000, 12_000)))
    with pytest.raises(DataError, match=r"b/a.png .12000 x 12000 pixels are more than 134,217,728"):
        decode_all([path])
