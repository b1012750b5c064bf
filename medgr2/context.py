"""Records that do not fit into a model's context: refused or left out before a stage computes anything."""

from PIL import Image

from medgr2 import vlm
from medgr2.errors import require
from medgr2.images import open_image

# Of how many sizes of images the tokens are counted: the largest ones have the most.
SIZES = 8


def leave_out_too_long(loaded, rows, image_of, text_of, new_of, skip):
    """The rows that fit into the context, each with the tokens that come behind its prompt.

    image_of, text_of, new_of: row → path of its image, text of its prompt, number of new tokens. Raises
    RecordError, with their number, unless `skip`; then it prints the number. All of them are an error too.
    """
    if loaded.context is None:
        return rows
    sizes = {path: read_size(path) for path in {image_of(row) for row in rows}}
    largest = sorted(set(sizes.values()), key=lambda size: (size[0] * size[1], size))[-SIZES:]
    most = max(count_tokens(loaded, Image.new("RGB", size), "?") for size in largest)
    kept, faults = [], []
    for row in rows:
        text, new = text_of(row), new_of(row)
        words = len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Only a prompt that may be too long is counted with its own image.
        tokens = most + words
        if tokens + new > loaded.context:
            tokens = count_tokens(loaded, open_image(image_of(row)), text)
        if tokens + new > loaded.context:
            faults.append(vlm.describe_too_long(loaded, tokens, new, text))
        else:
            kept.append(row)
    if faults:
        counted = f"{len(faults)} of {len(rows)} records are too long, the first: {faults[0]}"
        require(skip and kept, f"{counted}; or leave them out with --on-error skip")
        print(f"left out: {counted}", flush=True)
    return kept


def read_size(path):
    """(width, height) of an image, told by its head; of a small one if it has none: its reader will say."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):
        return 64, 64


def count_tokens(loaded, image, text):
    return vlm.encode_prompts(loaded, [image], [text], "cpu")["attention_mask"].shape[1]
