"""Images of any format as RGB pixels: opened, bounded, hashed."""

import hashlib
import os
import pathlib
import warnings

from medgr2.errors import RecordError, require

# of an image: its file, width x height, longer / shorter side
MOST_BYTES, MOST_PIXELS, MOST_OBLONG = 256 << 20, 64 << 20, 200


def is_under(path, folders):
    """Does `path` lead into one of `folders` (real paths), all links followed? A stranger's record may name no other file."""
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, folder]) == folder for folder in folders)


def require_file(path):
    """Raise RecordError where `path` is a FIFO, a socket or a device: to open it could wait for ever."""
    require(
        os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path),
        f"{path}: not a regular file: give one",
    )


def open_image(path):
    """The image at `path` as a PIL image in mode RGB, as a viewer shows it. Raises RecordError.

    Turned upright by its EXIF tag. 16- and 32-bit grey values are scaled from the image's own range to 0..255:
    CT and MRI use 12 of 16 bits; clipped they would be white, divided by 256 black. Transparent parts show
    white. Of an animation, the first frame. Pixels alone: no metadata of the file goes along. One that is larger than
    MOST_BYTES or MOST_PIXELS, or narrower than 1 : MOST_OBLONG (more than a processor takes), is refused before it is decoded.
    """
    from PIL import Image, ImageOps

    try:
        require_file(path)
        require(
            os.path.getsize(path) <= MOST_BYTES, f"{path}: more than {MOST_BYTES >> 20} MiB: make it smaller"
        )
        # the library's own limit: more than ours
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            require(
                file.width * file.height <= MOST_PIXELS,
                f"{path}: {file.width} x {file.height} pixels, more than {MOST_PIXELS >> 20} Mi: make it smaller",
            )
            require(
                max(file.size) <= MOST_OBLONG * min(file.size),
                f"{path}: {file.width} x {file.height} pixels, a strip: no model reads it, replace it",
            )
            image = ImageOps.exif_transpose(file)
        # I;16, I, F
        if image.mode[0] in "IF":
            import numpy

            values = numpy.asarray(image, dtype=numpy.float64)  # (H, W)
            values = numpy.nan_to_num(values, posinf=0, neginf=0)
            values = (values - values.min()) * (255 / (numpy.ptp(values) or 1))
            image = Image.fromarray(values.round().astype(numpy.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        # a colour profile would go on into every PNG made of the image
        image.info = {}
        return image
    except RecordError:
        raise
    except FileNotFoundError:
        raise RecordError(
            f"{path}: no such image: correct the record's `image`, or --images at import"
        ) from None
    except Exception as error:
        # a decoder raises whatever it likes at a broken file
        what = " ".join(str(error).replace(repr(str(path)), "").split()) or type(error).__name__
        raise RecordError(
            f"{path}: not a readable image ({what}): replace it or remove its records"
        ) from None


def find_unreadable(records, limit):
    """{image: why} of the records whose image cannot be read. Raises RecordError where these are more than `limit`, or all.

    `limit` is a share of the records. What --on-error skip sets aside, found before the first hour is spent.
    """
    whys = {}
    for path in {record["image"]: None for record in records}:
        try:
            open_image(path)
        except RecordError as error:
            whys[path] = str(error)
    bad = [whys[record["image"]] for record in records if record["image"] in whys]
    require(
        len(bad) <= limit * len(records) and len(bad) < max(len(records), 1),
        bad and f"{bad[0]} (and {len(bad) - 1} more of {len(records)}: above --max-rejected {limit})",
    )
    return whys


def hash_image(path):
    """SHA-256 of the file's bytes, in hex: two names of one image are one image. Raises RecordError."""
    require_file(path)
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}: correct the record's `image`") from None
