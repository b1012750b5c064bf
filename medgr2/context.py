"""Records that do not fit into a model's context: refused or left out before a stage computes anything."""

import functools

from PIL import Image

from medgr2 import encoding
from medgr2.errors import RecordError, require
from medgr2.images import open_image
from medgr2.progress import is_first, tell

# Tokens are counted for this many of the largest image sizes.
SIZES = 8


def leave_out_too_long(loaded, rows, image_of, text_of, new_of, skip):
    """The rows that fit into the context (see find_too_long). Prints how many do not.

    Raises RecordError if one does not, unless `skip`, and if none does.
    """
    too_long = find_too_long(loaded, rows, image_of, text_of, new_of)
    kept = [row for i, row in enumerate(rows) if i not in too_long]
    if too_long:
        counted = (
            f"{len(too_long)} of {len(rows)} records are too long, the first: {min(too_long.items())[1]}"
        )
        require(skip and kept, f"{counted}; or leave them out with --on-error skip")
        tell(f"left out: {counted}")
    return kept


def find_too_long(loaded, rows, image_of, text_of, new_of):
    """{index of a row that does not fit into the context: why}.

    image_of, text_of, new_of: row → path of its image, text of its prompt, most tokens of its reply.
    """
    if loaded.context is None or not rows:
        return {}
    sizes = largest_sizes(map(image_of, rows))
    most = max(count_tokens(loaded, Image.new("RGB", size), "?") for size in sizes)
    found = {}
    for i, row in enumerate(rows):
        text, new = text_of(row), new_of(row)
        tokens = most + len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Only a prompt that may be too long is counted with its own image.
        if tokens + new > loaded.context:
            try:
                tokens = count_tokens(loaded, open_image(image_of(row)), text)
            except RecordError:
                # An unreadable image: the stage says so, or leaves it out, when it opens it.
                continue
        if tokens + new > loaded.context:
            found[i] = encoding.describe_too_long(loaded, tokens, new, text)
    return found


def tell_image_tokens(loaded, paths):
    """Print how many tokens the largest of the images at these paths costs the model."""
    if not (paths and is_first()):
        return
    image_token, costs = loaded.model.config.image_token_id, []
    for size in largest_sizes(paths):
        inputs = encoding.encode_prompts(loaded, [Image.new("RGB", size)], ["?"], "cpu")
        costs.append((int((inputs["input_ids"] == image_token).sum()), size))
    if costs:
        tokens, (width, height) = max(costs)
        tell(f"an image has up to {tokens:,} tokens (one of {width} x {height} pixels)")


def largest_sizes(paths):
    """The SIZES largest sizes, (width, height), of the images at these paths."""
    return sorted({read_size(path) for path in set(paths)}, key=area)[-SIZES:]


def area(size):
    return size[0] * size[1], size


@functools.cache
def read_size(path):
    """(width, height) from an image's header; a small size if none: opening it will raise the error."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):
        return 64, 64


def count_tokens(loaded, image, text):
    return encoding.encode_prompts(loaded, [image], [text], "cpu")["attention_mask"].shape[1]
