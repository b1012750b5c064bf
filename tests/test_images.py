"""images.py: every kind of image becomes RGB; what is no image is refused."""

import warnings

import pytest

from medgr2.errors import RecordError
from medgr2.images import hash_image, open_image


def pixels(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return [[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)]


def grey(*rows):
    return [[(value,) * 3 for value in row] for row in rows]


def test_values_of_16_and_32_bits_are_scaled_by_their_range_and_not_clipped(tmp_path):
    import numpy
    from PIL import Image

    for values, name in (
        (numpy.array([[1000, 1255], [1510, 2020]], "uint16"), "u16.png"),
        (numpy.array([[-1000, -500], [0, 1000]], "int32"), "i32.tif"),
        (numpy.array([[0, 0.25], [0.5, 1]], "float32"), "f32.tif"),
    ):
        Image.fromarray(values).save(tmp_path / name)
        assert pixels(tmp_path / name) == grey((0, 64), (128, 255)), name
    Image.fromarray(numpy.full((1, 2), 700, "uint16")).save(tmp_path / "flat.png")
    with warnings.catch_warnings():
        # The range of its values is 0: nothing may be divided by it.
        warnings.simplefilter("error")
        assert pixels(tmp_path / "flat.png") == grey((0, 0))


def test_cmyk_grey_and_bilevel_become_rgb(tmp_path):
    from PIL import Image

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    red, green, blue = pixels(tmp_path / "red.jpg")[4][4]
    assert red > 240 and green < 15 and blue < 15
    Image.new("L", (1, 1), 77).save(tmp_path / "l.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "1.png")
    assert pixels(tmp_path / "l.png") == grey((77,)) and pixels(tmp_path / "1.png") == grey((255,))


def test_transparent_parts_are_white_whatever_their_hidden_colour(tmp_path):
    from PIL import Image

    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png") == [[(255, 255, 255), (0, 0, 200)]]
    Image.new("RGBA", (1, 1), (100, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (1, 1), (100, 255)).save(tmp_path / "la.png")
    assert pixels(tmp_path / "rgba.png") == grey((255,)) and pixels(tmp_path / "la.png") == grey((100,))


def test_an_image_is_turned_upright_by_its_exif_tag(tmp_path):
    from PIL import Image

    image = Image.new("L", (3, 2))
    image.putdata([1, 2, 3, 4, 5, 6])
    exif = Image.Exif()
    # To be shown turned by 90 degrees clockwise.
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert pixels(tmp_path / "turned.png") == grey((4, 1), (5, 2), (6, 3))


def test_an_animation_gives_its_first_frame(tmp_path):
    from PIL import Image

    Image.new("L", (1, 1), 10).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (1, 1), 200)]
    )
    assert pixels(tmp_path / "a.gif") == grey((10,))


def test_what_is_no_image_raises_a_record_error_that_names_the_path(tmp_path):
    import numpy
    from PIL import Image

    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")
    for name in ("cut.png", "cut.jpg", "cut.bmp"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "text.png").write_text("a chest X-ray, honestly")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "zero.gif").write_bytes(b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;")
    (tmp_path / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    names = [
        "cut.png",
        "cut.jpg",
        "cut.bmp",
        "text.png",
        "empty.png",
        "zero.gif",
        "zero.ppm",
        "missing.png",
        ".",
    ]
    for name in names:
        with pytest.raises(RecordError) as error:
            open_image(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message
        assert ("no such image" if name == "missing.png" else "not a readable image") in message, message
    with pytest.raises(RecordError, match="missing.png"):
        hash_image(tmp_path / "missing.png")


def test_image_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_image(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
