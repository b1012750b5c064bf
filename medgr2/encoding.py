"""What goes into a vision-language model and what comes out: images and texts → tensors, tensors → texts.

The letters are those of medgr2/vlm.py: `B` prompts, `N` = B·G rows, `P` prompt tokens, `C` continuation
tokens. `vlm` is its VLM. Prompts are padded on the left, continuations on the right.
"""

import inspect
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from medgr2.errors import ModelError, RecordError
from medgr2.images import fit_pixels

# How the template of a thinking model ends a prompt.
OPEN_THINK = re.compile(r"<think>\s*\Z")


@dataclass
class Prompt:
    """An image and a text. `inputs`: the model's, (1, P), features in place of pixels, if they are kept."""

    # None if it is not encoded again (VLM.keeps_images).
    image: Image.Image | None
    text: str
    inputs: dict = None


class Questions(NamedTuple):
    """What follows the image in each of B prompts, left-padded to (B, S)."""

    ids: torch.Tensor  # (B, S)
    mask: torch.Tensor  # (B, S)
    # The row of its image in the Inputs.
    image: torch.Tensor  # (B,)


class Inputs(dict):
    """The model's inputs of B prompts, left-padded to (B, P), and `prompts`, what they were made of.

    With `questions`, prompts share images: the tensors are of the U images and what precedes them, (U, P).
    """

    def __init__(self, tensors, prompts, questions=None):
        super().__init__(tensors)
        self.prompts, self.questions = prompts, questions

    def to(self, device):
        questions = self.questions and Questions(*(x.to(device) for x in self.questions))
        return Inputs({key: x.to(device) for key, x in self.items()}, self.prompts, questions)


def encode_prompts(vlm, images, texts, device=None):
    """B images (PIL, RGB) and B user texts → the model's Inputs, left-padded to (B, P).

    The name of a special token in a text is plain text: a space after its first character tells it from the
    token. A <think> with which the chat template opens the reply is left out: it belongs to the reply, which
    is sampled, trained on and parsed with both tags.
    """
    chats, settings = write_chats(vlm, texts)
    fitted = [[fit_pixels(image, *vlm.pixels)] for image in images]
    settings |= {"padding": True, "padding_side": "left"}
    tensors = vlm.processor(text=chats, images=fitted, return_tensors="pt", **settings)
    return Inputs(tensors, make_prompts(vlm, images, texts)).to(device or vlm.device)


def make_prompts(vlm, images, texts):
    return [Prompt(image if vlm.keeps_images else None, text) for image, text in zip(images, texts)]


def write_chats(vlm, texts):
    """User texts, each about one image → the text that the tokenizer gets, and its settings."""
    texts = [vlm.special_names.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text) for text in texts]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}] for t in texts]
    chats = [vlm.processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    chats = [OPEN_THINK.sub("", chat) for chat in chats]
    # Some templates write <bos>; the tokenizer must not write a second one.
    has_bos = vlm.tokenizer.bos_token is not None and chats[0].startswith(vlm.tokenizer.bos_token)
    return chats, {"add_special_tokens": not has_bos}


def encode_by_image(vlm, images, texts, device=None, always=False):
    """As encode_prompts, but prompts about one image (the same object) share it: Inputs with `questions`.

    It is then encoded, and prefilled with what precedes it, once. If no image occurs twice the Inputs are
    plain, unless `always`; those of a model that cannot share images (VLM.shares_images) are always plain.
    """
    first = {}
    for b, image in enumerate(images):
        first.setdefault(id(image), b)
    shown = list(first.values())
    if not vlm.shares_images or len(shown) == len(images) and not always:
        return encode_prompts(vlm, images, texts, device)
    whole = encode_prompts(vlm, [images[b] for b in shown], [texts[b] for b in shown], "cpu")  # (U, P)
    # With one token in the image's place; the question is what both end with.
    chats, settings = write_chats(vlm, texts)
    short = vlm.tokenizer(chats, **settings)["input_ids"]
    start = len(short[shown[0]]) - count_common_end(vlm, short[shown[0]], whole["input_ids"][0].tolist())
    ids = [torch.tensor(row[start:]) for row in short]
    has_one_start = all(row[:start] == short[0][:start] for row in short)
    if not has_one_start or any(
        not whole["input_ids"][u, -len(ids[b]) :].equal(ids[b]) for u, b in enumerate(shown)
    ):
        raise ModelError(f"{type(vlm.model).__name__}: its prompts differ before the question")
    number = {key: u for u, key in enumerate(first)}
    questions = Questions(
        pad_left(ids, vlm.tokenizer.pad_token_id),
        pad_left([torch.ones_like(row) for row in ids]),
        torch.tensor([number[id(image)] for image in images]),
    )
    inputs = Inputs({}, make_prompts(vlm, images, texts), questions)
    widths = whole["attention_mask"].sum(1)
    for key, x in whole.items():
        if x.shape == whole["input_ids"].shape:
            # One number per token: of what precedes the question.
            parts = [row[-n : -len(ids[b])] for row, n, b in zip(x, widths, shown)]
            x = pad_left(parts, vlm.tokenizer.pad_token_id if key == "input_ids" else 0)
        inputs[key] = x
    return inputs.to(device or vlm.device)


def count_common_end(vlm, a, b):
    """How many tokens two prompts with the same question end with, before their image."""
    for count, (x, y) in enumerate(zip(reversed(a), reversed(b))):
        if x != y or x == vlm.model.config.image_token_id:
            return count
    raise ModelError(f"{type(vlm.model).__name__}: found no image in its prompt")


def pad_left(rows, fill=0):
    return pad_sequence(rows, True, fill, "left")


def count_prompts(inputs):
    return len(inputs.questions.ids if inputs.questions else inputs["attention_mask"])


def repeat_prompts(vlm, inputs, group):
    """Inputs with `group` rows per prompt, encoded again: in many models an image has no row to repeat."""
    return select_prompts(vlm, inputs, [b for b in range(count_prompts(inputs)) for _ in range(group)])


def select_prompts(vlm, inputs, owner):
    """Inputs of these prompts, encoded again."""
    return collate_prompts(vlm, [inputs.prompts[b] for b in owner])


def preprocess(vlm, images, texts):
    """The processor's part of encode_images, on the CPU: a thread can do it, with a processor of its own."""
    if vlm.reuses_features:
        return encode_prompts(vlm, images, texts, "cpu")
    return Inputs({}, [Prompt(image, text) for image, text in zip(images, texts)])


@torch.no_grad()
def encode_images(vlm, inputs):
    """Preprocessed Inputs → B Prompts. The vision tower runs here, once for samples, reference and updates.

    This requires loading.freeze_images. Otherwise the Prompts keep no features, and every pass encodes the
    pixels.
    """
    if not vlm.reuses_features:
        return inputs.prompts
    inputs, prompts = inputs.to(vlm.device), inputs.prompts
    tower = vlm.model.base_model.get_image_features
    asked = {key: inputs[key] for key in inspect.signature(tower).parameters if key in inputs}
    outputs = tower(**asked, return_dict=True)
    features = split_features(vlm, outputs.pooler_output, inputs["input_ids"])
    # Qwen3-VL adds features in deeper layers: per layer a list with one entry per image.
    deepstack = getattr(outputs, "deepstack_features", None) or []
    found = []
    for b, prompt in enumerate(prompts):
        kept = SimpleNamespace(
            pooler_output=features[b], deepstack_features=[x[b : b + 1] for x in deepstack]
        )
        found.append(
            Prompt(prompt.image, prompt.text, one_row(inputs, b) | {"mm_encoder_outputs": {"image": kept}})
        )
    return found


def split_features(vlm, features, input_ids):
    """The features of each prompt's image, from a tensor (tiles, tokens, D) or a list of (tokens, D)."""
    if not torch.is_tensor(features):
        return [[x] for x in features]
    tokens = (input_ids == vlm.model.config.image_token_id).sum(1)  # (B,)
    return features.split((tokens // features.shape[1]).tolist())


def one_row(inputs, b):
    """Row b of the inputs, without padding and pixels: (1, P_b)."""
    width = int(inputs["attention_mask"][b].sum())
    row = {}
    for key, x in inputs.items():
        if not key.startswith("pixel_"):
            row[key] = x[b : b + 1, -width:] if x.shape == inputs["input_ids"].shape else x[b : b + 1]
    return row


def collate_prompts(vlm, prompts):
    """B Prompts → the model's Inputs, left-padded to (B, P), as encode_prompts makes them."""
    if prompts[0].inputs is None:
        return encode_prompts(vlm, [p.image for p in prompts], [p.text for p in prompts])
    rows = [p.inputs for p in prompts]
    width = max(row["input_ids"].shape[1] for row in rows)
    batch = Inputs({}, prompts)
    for key, x in rows[0].items():
        if key == "mm_encoder_outputs":
            batch[key] = {"image": collate_features([row[key]["image"] for row in rows])}
        elif x.shape == rows[0]["input_ids"].shape:
            # One number per token.
            fill = vlm.tokenizer.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat(
                [pad(row[key], (width - row[key].shape[1], 0), value=fill) for row in rows]
            )
        else:
            # One row per image.
            batch[key] = torch.cat([row[key] for row in rows])
    return batch


def collate_features(kept):
    """The kept features of B images as the library returns them for one batch."""

    def join(parts):
        return torch.cat(parts) if torch.is_tensor(parts[0]) else [x for part in parts for x in part]

    deepstack = [join(layer) for layer in zip(*(k.deepstack_features for k in kept))]
    return SimpleNamespace(pooler_output=join([k.pooler_output for k in kept]), deepstack_features=deepstack)


def encode_continuations(vlm, texts, end=True, device=None):
    """N responses → (ids, mask), right-padded to (N, C). Each ends with the end-of-turn token, which counts.

    The name of a special token in a text is plain text: an image placeholder without an image would stop the
    forward pass.
    """
    rows = [vlm.tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]
    rows = [row + [vlm.end_id] * end for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [vlm.tokenizer.pad_token_id] * (width - len(row)) for row in rows])  # (N, C)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])  # (N, C)
    return ids.to(device or vlm.device), mask.to(device or vlm.device)


def append_replies(inputs, ids, mask):
    """Rows of prompts with a reply each, ids (B, C) → (Inputs, index (T,), targets (T,)); all on the CPU.

    Their width W is that of the longest prompt with its reply, all padding is on the left. If prompts share
    images, the questions go on with the replies. targets: the T tokens of the replies; index: where in the
    rows' states (B, W, D), flattened to (B·W, D), stands the one that predicts each.
    """
    questions = inputs.questions
    before = questions.mask if questions else inputs["attention_mask"]  # (B, P)
    whole = torch.cat([before, mask], 1)  # (B, P+C)
    width = int(whole.sum(1).max())
    # The columns of each row: padding first, then its tokens in order.
    columns = whole.argsort(dim=1, stable=True)[:, -width:]  # (B, W)

    def join(x, added):
        return torch.cat([x, added], 1).gather(1, columns)

    is_reply = join(torch.zeros_like(before), mask)
    index = is_reply.flatten().nonzero()[:, 0]
    if questions:
        rows = join(questions.ids, ids)
        joined = Inputs(inputs, inputs.prompts, Questions(rows, join(questions.mask, mask), questions.image))
    else:
        rows, joined = join(inputs["input_ids"], ids), Inputs(inputs, inputs.prompts)
        for key, x in inputs.items():
            if x.shape == before.shape:
                # A reply is text: type 0.
                added = {"input_ids": ids, "attention_mask": mask}.get(key, torch.zeros_like(ids))
                joined[key] = join(x, added)
    return joined, index - 1, rows.flatten()[index]


def decode(vlm, ids, mask):
    """(N, C) sampled ids → N texts, without the end-of-turn token."""
    rows = [row[m.bool()] for row, m in zip(ids.cpu(), mask.cpu())]
    return [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def require_context(vlm, inputs, new):
    """Raise RecordError if the longest of the prompts, with `new` tokens after it, is beyond the context.

    Most models would answer, and learn, from positions that they were never trained on.
    """
    mask, questions = inputs["attention_mask"], inputs.questions
    width = mask.shape[1] + (questions.ids.shape[1] if questions else 0)
    if vlm.context is None or width + new <= vlm.context:
        return
    # The widest image may not be that of the widest question.
    tokens = mask.sum(1)[questions.image] + questions.mask.sum(1) if questions else mask.sum(1)  # (B,)
    longest = int(tokens.max())
    if longest + new > vlm.context:
        prompt = inputs.prompts[int(tokens.argmax())].text if inputs.prompts else ""
        raise RecordError(describe_too_long(vlm, longest, new, prompt))


def describe_too_long(vlm, tokens, new, prompt):
    reply = f" and {new} of the reply" if new else ", reply included,"
    lower = " or lower --max-new-tokens" if new else ""
    return (
        f"{tokens} tokens of prompt and image{reply} are more than the model's context of {vlm.context} "
        f"({prompt[:60]!r}): shorten the question or shrink the image{lower}"
    )
