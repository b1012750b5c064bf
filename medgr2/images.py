"""Images of any format as RGB pixels: opened, bounded in size, hashed; written if they come as bytes."""

import base64
import hashlib
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

from medgr2.errors import RecordError, require
from medgr2.progress import progress

# The largest image that is opened: bytes of its file, width * height, longer / shorter side.
MAX_BYTES = 256 << 20
MAX_PIXELS = 64 << 20
MAX_ASPECT_RATIO = 200
# The percentiles of deep values that become black and white. One hot pixel must not darken the others.
BLACK, WHITE = 1, 99
# Pillow's name of the other byte order (N is the machine's own).
SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# The first bytes of the usual formats, by which a text or a cell is recognised as an image.
SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def is_under(path, folders):
    """Does `path` lead into one of `folders` (real paths), links followed?

    A record from a stranger may name no file elsewhere.
    """
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, folder]) == folder for folder in folders)


def require_file(path):
    """Raise RecordError if `path` is a FIFO, a socket or a device: opening it could wait forever."""
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    require(not is_special, f"{path}: not a regular file: give one")


def open_image(path):
    """The image at `path` as a viewer shows it: a PIL image in mode RGB. Raises RecordError.

    - It is turned upright by its EXIF tag.
    - Values of more than 8 bits are scaled from the image's own range to 0..255. CT and MRI use 12 of the 16
      bits: clipped they would be white, divided by 256 black.
    - DICOM (needs pydicom): the first frame, rescaled and windowed as the file says.
    - Transparent parts are white.
    - Of an animation only the first frame is used.
    - Only the pixels are kept, no metadata.
    - An image larger than MAX_BYTES or MAX_PIXELS, or narrower than 1 : MAX_ASPECT_RATIO (more than a
      processor takes), is refused before it is decoded.
    """
    from PIL import Image, ImageOps

    try:
        require_file(path)
        require(
            os.path.getsize(path) <= MAX_BYTES, f"{path}: more than {MAX_BYTES >> 20} MiB: make it smaller"
        )
        if is_dicom(path):
            return open_dicom(path)
        # Pillow's own limit, above ours, is a warning by default.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            require_size(path, file.width, file.height)
            return to_rgb(ImageOps.exif_transpose(read_deep_colours(path, file) or file))
    except RecordError:
        raise
    except FileNotFoundError:
        advice = "correct the record's `image`, or --images at import"
        raise RecordError(f"{path}: no such image: {advice}") from None
    except Exception as error:
        # A decoder may raise anything if the file is broken.
        reason = " ".join(str(error).replace(repr(str(path)), "").split()) or type(error).__name__
        advice = "replace it or remove its records"
        raise RecordError(f"{path}: not a readable image ({reason}): {advice}") from None


def open_images(paths):
    """open_image of each path; equal paths get the same object, so that prompts about it can share it."""
    opened, found = {}, []
    for path in paths:
        if path not in opened:
            opened[path] = open_image(path)
        found.append(opened[path])
    return found


def blank_images(images):
    """A grey image, which shows nothing, for each: of the same size and so of as many tokens.

    Equal sizes get the same object, so that prompts can share it.
    """
    from PIL import Image

    blank = {size: Image.new("RGB", size, (128, 128, 128)) for size in {image.size for image in images}}
    return [blank[image.size] for image in images]


def require_size(path, width, height):
    """Raise RecordError if an image of this size, in pixels, is too large or too narrow."""
    size = f"{path}: {width} x {height} pixels"
    require(width * height <= MAX_PIXELS, f"{size}, more than {MAX_PIXELS >> 20} Mi: make it smaller")
    is_strip = max(width, height) > MAX_ASPECT_RATIO * min(width, height)
    require(not is_strip, f"{size}, too narrow for any model: replace it")


def to_rgb(image):
    """A PIL image of any mode as one in mode RGB, without metadata."""
    from PIL import Image

    # The modes of 16 and 32 bits: I;16, I, F.
    if image.mode[0] in "IF":
        image = scale_to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    # A colour profile would be copied into every PNG made of the image.
    image.info = {}
    return image


def fit_pixels(image, least=None, most=None):
    """The PIL image resized to at least `least` and at most `most` pixels, in proportion. None: any."""
    from PIL import Image

    width, height = image.size
    pixels = width * height
    if most and pixels > most:
        shrink = math.sqrt(most / pixels)
        size = max(1, math.floor(width * shrink)), max(1, math.floor(height * shrink))
    elif least and pixels < least:
        grow = math.sqrt(least / pixels)
        size = math.ceil(width * grow), math.ceil(height * grow)
    else:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)


def scale_to_8_bits(values):
    """Values of more than 8 bits (grey, or colours with one range) as a PIL image of 8 bits.

    The percentiles BLACK and WHITE become 0 and 255, or the lowest and the highest value if those two are the
    same. BLACK is a percentile of each pixel's lowest colour, WHITE of its highest.
    """
    import numpy
    from PIL import Image

    values = numpy.asarray(values, dtype=numpy.float64)  # (H, W) or (H, W, 3)
    values = numpy.nan_to_num(values, posinf=0, neginf=0)
    pixels = values.reshape(values.shape[0] * values.shape[1], -1)  # (H·W, 1 or 3)
    low = numpy.percentile(pixels.min(1), BLACK, method="nearest")
    high = numpy.percentile(pixels.max(1), WHITE, method="nearest")
    if low >= high:
        low, high = values.min(), values.max()
    values = (values - low) * (255 / ((high - low) or 1))
    return Image.fromarray(values.clip(0, 255).round().astype(numpy.uint8))


def read_deep_colours(path, file):
    """A 16-bit PNG or TIFF in colour, or grey with alpha, as an image of 8 bits; None if it is another one.

    Pillow keeps the high bytes of such values, and read in the other byte order the low ones. `file`: the
    opened image.
    """
    import numpy
    from PIL import Image

    rawmode = find_rawmode(file)
    mode, _, order = rawmode.partition(";16")
    if not order:
        return None
    if mode == "LA":
        # The four bytes of a pixel, as if they were four channels.
        high_low = numpy.asarray(open_raw(path, "RGBA"), dtype=int)  # (H, W, 4)
        high, low = high_low[..., ::2], high_low[..., 1::2]
    else:
        orders = (order, SWAPPED[order])
        high, low = (numpy.asarray(open_raw(path, f"{mode};16{o}"), dtype=int) for o in orders)
    values = high * 256 + low  # (H, W, C)
    image = scale_to_8_bits(values[..., 0] if mode == "LA" else values[..., :3])
    if mode != "RGB":
        # Alpha is a share, so its range is fixed.
        image.putalpha(Image.fromarray((values[..., -1] // 257).astype(numpy.uint8)))
    orientation = file.getexif().get(0x0112)
    if orientation:
        image.getexif()[0x0112] = orientation
    return image


def find_rawmode(file):
    """Pillow's name of the layout of an image's values; "" if the file is not in one of the two formats."""
    if file.format not in ("PNG", "TIFF") or file.mode not in ("RGB", "RGBA") or not file.tile:
        return ""
    args = file.tile[0].args
    return args if isinstance(args, str) else str(args[0])


def open_raw(path, rawmode):
    """The image at `path` with its bytes taken for values of this layout."""
    from PIL import Image

    with Image.open(path) as file:
        tiles = []
        for tile in file.tile:
            args = rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:])
            tiles.append(tile._replace(args=args))
        file.tile = tiles
        file.load()
        return file.copy()


# ---------------------------------------------------------------------------------------------------------
# DICOM.


def is_dicom(path):
    """Is the file DICOM, by its name or by the mark after its first 128 bytes?"""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM" or str(path).lower().endswith((".dcm", ".dicom"))


def open_dicom(path):
    """The first frame of a DICOM file as a PIL image in mode RGB. No text of its header is kept.

    Grey values are rescaled and windowed as the file says; without a window their own range is used.
    MONOCHROME1, in which high values are dark, is inverted.
    """
    from PIL import Image, ImageOps

    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError:
        raise RecordError(f"{path}: DICOM needs pydicom: pip install pydicom") from None
    data = pydicom.dcmread(path, force=True)
    require_size(path, data.Columns, data.Rows)
    values = pixel_array(data, index=0)  # (H, W), or (H, W, 3) in colours
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        return to_rgb(Image.fromarray(values) if values.dtype.itemsize == 1 else scale_to_8_bits(values))
    data.update(first_frame_fields(data))
    image = apply_window(apply_modality_lut(values, data), data)
    return to_rgb(ImageOps.invert(image) if data.PhotometricInterpretation == "MONOCHROME1" else image)


def first_frame_fields(data):
    """The fields for rescaling and windowing that a DICOM data set has for its first frame only."""
    found = {}
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(data.get(name) or [])[:1]:
            for inner in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in list(group.get(inner) or [])[:1]:
                    found |= {element.tag: element for element in item}
    return found


def apply_window(values, data):
    """Rescaled values (H, W) as a grey image of 8 bits, by the file's first window or table of values."""
    import numpy
    from PIL import Image
    from pydicom.pixels import apply_voi_lut

    if data.get("VOILUTSequence"):
        values = apply_voi_lut(values.round().astype(int), data)
        low, high = 0, 2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif has_window(data):
        with numpy.errstate(over="ignore"):
            # What is far below and far above the window becomes black and white.
            low, high = apply_voi_lut(numpy.array([-1e9, 1e9]), data)
            values = apply_voi_lut(values, data)
    else:
        return scale_to_8_bits(values)
    return Image.fromarray(((values - low) * (255 / (high - low))).clip(0, 255).round().astype("uint8"))


def has_window(data):
    """Does the data set give a window that is wide enough to be applied?"""
    widths = data.get("WindowWidth")
    width = widths[0] if isinstance(widths, Sequence) and widths else widths
    return data.get("WindowCenter") is not None and isinstance(width, (int, float)) and width >= 1


# ---------------------------------------------------------------------------------------------------------
# Images that come as bytes, and files.


class ImageFolder:
    """A folder for images that come as bytes: each content is written once, named by its SHA-256."""

    def __init__(self, path):
        self.path, self.written = path, []

    def add(self, content):
        """The path of the file with this content, written if it is not there."""
        suffix = next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), "")
        path = os.path.join(self.path, hashlib.sha256(content).hexdigest() + suffix)
        if not os.path.exists(path):
            os.makedirs(self.path, exist_ok=True)
            self.written.append(path)
            pathlib.Path(f"{path}.tmp").write_bytes(content)
            os.replace(f"{path}.tmp", path)
        return path

    def remove(self):
        """Remove what was written, and the folder if it is then empty."""
        for path in self.written:
            pathlib.Path(path).unlink(missing_ok=True)
            pathlib.Path(f"{path}.tmp").unlink(missing_ok=True)
        if self.written and not os.listdir(self.path):
            os.rmdir(self.path)


def image_bytes(value):
    """The image that a cell holds: {bytes, path}, bytes, or base64 text. None if it is only a path."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, str):
        try:
            content = base64.b64decode(content.partition("base64,")[2] or content, validate=True)
        except ValueError:
            return None
        # A short name can be base64, too.
        return content if content.startswith(tuple(SIGNATURES)) and len(content) > 32 else None
    return bytes(content) if isinstance(content, (bytes, bytearray)) and content else None


def find_file(path, folder=""):
    """The absolute path of an image in `folder`, whose name may be written with backslashes (Windows)."""
    place = os.path.abspath(os.path.join(folder, path))
    if "\\" in path and not os.path.exists(place):
        place = os.path.abspath(os.path.join(folder, path.replace("\\", "/")))
    return place


def find_unreadable(rows, limit):
    """{image: reason} of the images that cannot be opened; --on-error skip sets their records aside.

    Raises RecordError if the fraction of these records is above `limit`, or if they are all. Stages call it
    before they compute anything.
    """
    reasons = {}
    # A dict keeps the order of the file.
    for path in progress(dict.fromkeys(row["image"] for row in rows), "images"):
        try:
            open_image(path)
        except RecordError as error:
            reasons[path] = str(error)
    bad = [reasons[row["image"]] for row in rows if row["image"] in reasons]
    if bad:
        more = f"{len(bad) - 1} more of {len(rows)}" + f": above --max-rejected {limit}" * (limit < 1)
        is_few = len(bad) <= limit * len(rows) and len(bad) < len(rows)
        require(is_few, f"{bad[0]} (and {more})")
    return reasons


def hash_image(path):
    """SHA-256 of the file's bytes, in hex: one image under two names has one hash. Raises RecordError."""
    require_file(path)
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: correct the record's `image`") from None
