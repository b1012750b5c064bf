"""images.py: every kind of image becomes RGB; what is no image is refused."""

import struct
import sys
import warnings
import zlib

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


# Deep values ----------------------------------------------------------------------------------------------


def put_png_16(path, values, colour):
    """A 16-bit PNG, written by hand. `values`: (H, W, C); `colour`: PNG's type, 0, 2, 4 or 6."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def put_tiff_16(path, values, order):
    """A 16-bit TIFF of colours (H, W, 3), written by hand in byte order `<` or `>`."""
    height, width, channels = values.shape
    data = values.astype(order + "u2").tobytes()
    # Tag, type (3: 16 bits, 4: 32 bits), count, value.
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8 + 2 + 12 * 9 + 4), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 8 + 2 + 12 * 9 + 4 + 2 * channels), (277, 3, 1, channels)]
    tags += [(278, 4, 1, height), (279, 4, 1, len(data))]
    entries = b""
    for tag, kind, count, value in tags:
        packed = struct.pack(
            order + ("HH" if kind == 3 and count == 1 else "I"), value, *[0] * (kind == 3 and count == 1)
        )
        entries += struct.pack(order + "HHI", tag, kind, count) + packed
    depths = struct.pack(order + "H" * channels, *[16] * channels)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + depths + data)


def ramp():
    """(8, 8) values of 12 bits, as CT has them, from 0 to 4095."""
    import numpy

    return numpy.linspace(0, 4095, 64).reshape(8, 8).astype(int)


def by_hand(values):
    """Scaled so that the second-lowest and the second-highest of 64 values are 0 and 255."""
    low, high = sorted(values.flatten())[1], sorted(values.flatten())[-2]
    return grey(*([round(min(max((v - low) / (high - low), 0), 1) * 255) for v in row] for row in values))


@pytest.mark.parametrize("channels, colour", [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_12_of_16_bits_use_the_whole_range_in_grey_in_colour_and_with_alpha(tmp_path, channels, colour):
    import numpy

    values = numpy.repeat(ramp()[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    put_png_16(tmp_path / "a.png", values, colour)
    assert pixels(tmp_path / "a.png") == by_hand(ramp())


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_tiff_in_colour_uses_the_whole_range_too(tmp_path, order):
    import numpy

    put_tiff_16(tmp_path / "a.tif", numpy.repeat(ramp()[..., None], 3, axis=2), order)
    assert pixels(tmp_path / "a.tif") == by_hand(ramp())


@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 2)])
def test_one_hot_and_one_dead_pixel_do_not_darken_the_others(tmp_path, channels, colour):
    import numpy

    values = ramp() + 1000
    values[0, 0], values[7, 7] = 0, 65535
    put_png_16(tmp_path / "a.png", numpy.repeat(values[..., None], channels, axis=2), colour)
    assert pixels(tmp_path / "a.png") == by_hand(ramp())


def test_16_bit_colours_keep_their_hue_and_transparent_parts_are_white(tmp_path):
    import numpy

    values = numpy.zeros((1, 3, 4), int)
    values[0, :, :3] = [[0, 2000, 4000], [4000, 0, 2000], [0, 0, 0]]
    values[0, :, 3] = [65535, 65535, 0]
    put_png_16(tmp_path / "a.png", values, 6)
    assert pixels(tmp_path / "a.png") == [[(0, 128, 255), (255, 0, 128), (255, 255, 255)]]


def test_a_few_bright_values_on_a_flat_ground_are_not_lost(tmp_path):
    import numpy

    values = numpy.zeros((20, 20, 1), int)
    values[3, 4], values[3, 5] = 3000, 1500
    put_png_16(tmp_path / "a.png", values, 0)
    assert pixels(tmp_path / "a.png")[3][3:7] == grey((0, 255, 128, 0))[0]


# DICOM ----------------------------------------------------------------------------------------------------


def put_dicom(path, frames, **fields):
    """A DICOM file of 16-bit grey values (frames, H, W). `fields` are added; None removes one."""
    import numpy
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    values = numpy.asarray(frames)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID, data.PatientName = CTImageStorage, "1.2.3", "Doe^Jane"
    data.Rows, data.Columns = values.shape[1:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    if len(values) > 1:
        data.NumberOfFrames = len(values)
    data.PixelData = values.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


# Stored 0, 1024, 2048; less 1024 these are -1024, 0, 1024.
STORED = [[[0, 1024, 2048]]]


@pytest.mark.parametrize(
    "fields, wanted",
    [
        # No window: the file's own range.
        ({}, (0, 128, 255)),
        # From -1024 to 0: (x - (c - 0.5)) / (w - 1) + 0.5, as the standard says.
        ({"WindowCenter": -511.5, "WindowWidth": 1025, "RescaleIntercept": -1024}, (0, 255, 255)),
        ({"WindowCenter": 0.5, "WindowWidth": 4097, "RescaleIntercept": -1024}, (64, 128, 191)),
        # The first of two windows.
        ({"WindowCenter": [0.5, 9], "WindowWidth": [4097, 9], "RescaleIntercept": -1024}, (64, 128, 191)),
        ({"WindowCenter": 1024.5, "WindowWidth": 2049, "RescaleSlope": 0.5}, (0, 64, 128)),
        ({"PhotometricInterpretation": "MONOCHROME1"}, (255, 127, 0)),
        # A window without a width is none.
        ({"WindowCenter": 40, "WindowWidth": 0}, (0, 128, 255)),
    ],
)
def test_dicom_is_rescaled_and_windowed_as_the_file_says(tmp_path, fields, wanted):
    if "RescaleIntercept" in fields or "RescaleSlope" in fields:
        fields = {"RescaleIntercept": 0, "RescaleSlope": 1} | fields
    path = put_dicom(tmp_path / "scan", STORED, **fields)
    [found] = pixels(path)
    assert all(abs(f - w) <= 1 for (f, _, _), w in zip(found, wanted)), found
    assert all(len(set(pixel)) == 1 for pixel in found)


def test_dicom_gives_its_first_frame_and_no_text_of_its_header(tmp_path):
    path = put_dicom(tmp_path / "scan.dcm", [[[0, 1000, 2000]], [[2000, 0, 0]]])
    assert pixels(path)[0][2] == (255, 255, 255)
    image = open_image(path)
    image.save(tmp_path / "out.png")
    assert image.info == {} and b"Doe" not in (tmp_path / "out.png").read_bytes()


def test_an_enhanced_dicom_has_its_window_by_frame(tmp_path):
    import pydicom

    window, rescale, group = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 0.5, 4097
    rescale.RescaleIntercept, rescale.RescaleSlope = -1024, 1
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
    path = put_dicom(tmp_path / "scan", STORED, PerFrameFunctionalGroupsSequence=[group])
    assert [pixel[0] for pixel in pixels(path)[0]] == pytest.approx([64, 128, 191], abs=1)


def test_a_table_of_grey_values_is_applied(tmp_path):
    import pydicom

    table = pydicom.Dataset()
    table.LUTDescriptor = [3, 1023, 10]
    table.LUTData = struct.pack("<3H", 0, 1023, 512)
    path = put_dicom(tmp_path / "scan", STORED, VOILUTSequence=[table])
    # Below the table its first value, above it the last.
    assert [pixel[0] for pixel in pixels(path)[0]] == pytest.approx([0, 255, 128], abs=1)


def test_without_pydicom_one_line_says_so_and_a_broken_file_is_no_image(tmp_path, monkeypatch):
    path = put_dicom(tmp_path / "scan", STORED)
    (tmp_path / "cut.dcm").write_bytes(path.read_bytes()[:200])
    with pytest.raises(RecordError, match="cut.dcm: not a readable image"):
        open_image(tmp_path / "cut.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(RecordError, match="scan: DICOM needs pydicom: pip install pydicom"):
        open_image(path)
