"""Images of any format as RGB pixels: opened, bounded in size, hashed."""

import hashlib
import os
import pathlib
import warnings

from medgr2.errors import RecordError, require

# The largest image that is opened: bytes of its file, width * height, longer / shorter side.
MAX_BYTES = 256 << 20
MAX_PIXELS = 64 << 20
MAX_ASPECT_RATIO = 200


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
    - 16- and 32-bit grey values are scaled from the image's own range to 0..255. CT and MRI use 12 of the 16
      bits: clipped they would be white, divided by 256 black.
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
        # Pillow's own limit, above ours, is a warning by default.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            require_size(path, file.width, file.height)
            return to_rgb(ImageOps.exif_transpose(file))
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


def scale_to_8_bits(image):
    """A grey image of 16 or 32 bits with its range of values scaled to 0..255."""
    import numpy
    from PIL import Image

    values = numpy.asarray(image, dtype=numpy.float64)  # (H, W)
    values = numpy.nan_to_num(values, posinf=0, neginf=0)
    values = (values - values.min()) * (255 / (numpy.ptp(values) or 1))
    return Image.fromarray(values.round().astype(numpy.uint8))


def find_unreadable(rows, limit):
    """{image: reason} of the images that cannot be opened; --on-error skip sets their records aside.

    Raises RecordError if the fraction of these records is above `limit`, or if they are all. Stages call it
    before they compute anything.
    """
    reasons = {}
    # A dict keeps the order of the file.
    for path in dict.fromkeys(row["image"] for row in rows):
        try:
            open_image(path)
        except RecordError as error:
            reasons[path] = str(error)
    bad = [reasons[row["image"]] for row in rows if row["image"] in reasons]
    if bad:
        more = f"{len(bad) - 1} more of {len(rows)}"
        is_few = len(bad) <= limit * len(rows) and len(bad) < len(rows)
        require(is_few, f"{bad[0]} (and {more}: above --max-rejected {limit})")
    return reasons


def hash_image(path):
    """SHA-256 of the file's bytes, in hex: one image under two names has one hash. Raises RecordError."""
    require_file(path)
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: correct the record's `image`") from None
