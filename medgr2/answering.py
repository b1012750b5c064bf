"""A model that answers questions for eval.py, here or behind a server. eval.py needs torch only here."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

from medgr2 import endpoint
from medgr2.prefetch import for_preparing
from medgr2.prompts import format_response, policy_prompt


class Model(NamedTuple):
    # encode(images, texts) → prompts, for respond and score. A thread or another process may call it.
    encode: Callable
    # respond(prompts, seeds=None, temperature=0, group=1) → [(response, truncated)]: `group` responses to
    # each prompt in turn. Greedy responses need no seeds.
    respond: Callable
    # score(prompts, questions) → compute_option_logps. None: a server does not say.
    score: Callable = None
    # find_too_long(records) → {index of a record that does not fit into the context: why}, or None.
    find_too_long: Callable = None


def open_model(name, max_new_tokens, pixels=(None, None), images=()):
    """A Model on this machine.

    `images`: the paths of those that it will see, with at least and at most so many `pixels`.
    """
    from medgr2 import context, encoding, loading

    vlm_ = loading.load(name, dtype=loading.best_dtype())
    loading.limit_pixels(vlm_, *pixels)
    context.tell_image_tokens(vlm_, images)
    parts = {"image_of": itemgetter("image"), "text_of": policy_prompt, "new_of": lambda _: max_new_tokens}
    preparing = for_preparing(vlm_)
    return Model(
        functools.partial(encoding.encode_by_image, preparing, device="cpu"),
        functools.partial(ask_model, vlm_, max_new_tokens),
        functools.partial(compute_option_logps, vlm_),
        functools.partial(context.find_too_long, preparing, **parts),
    )


def open_server(args):
    """A Model behind a server."""
    respond = functools.partial(ask_server, endpoint.connect(args), args.max_new_tokens)
    return Model(pair, respond)


def pair(images, texts):
    return list(zip(images, texts))


def ask_model(vlm_, max_new_tokens, prompts, seeds=None, temperature=0, group=1):
    from medgr2 import encoding, vlm

    prompts = prompts.to(vlm_.device)  # (B, P)
    ids, mask, truncated = vlm.sample(vlm_, prompts, seeds, max_new_tokens, temperature, group)  # (N, C)
    return list(zip(encoding.decode(vlm_, ids, mask), truncated.tolist()))


def ask_server(ask, max_new_tokens, prompts, seeds=None, temperature=0, group=1):
    """As ask_model, by a server. ask: from endpoint.connect."""
    asked = [prompt for prompt in prompts for _ in range(group)]
    # 31 bits: servers take no more.
    seeds = [seed >> 32 for seed in seeds or [0] * len(asked)]
    requests = [endpoint.Request(*prompt, seed) for prompt, seed in zip(asked, seeds)]
    return ask(requests, temperature=temperature, max_tokens=max_new_tokens)


def compute_option_logps(vlm_, prompts, questions):
    """Of each of B questions: (Σ log π in nats, number of tokens), two lists over its options.

    An option follows the prompt as an answer without reasoning, and ends with its closing tag: without the
    tag, `CT` would be as probable as all that begins with `CT`. Only the option and the tag count. Image and
    question are encoded once for all options.
    """
    import torch

    from medgr2 import encoding, vlm

    head, tail = format_response(None, "\n").split("\n")
    numbers = [len(question["options"]) for question in questions]
    owner = [b for b, n in enumerate(numbers) for _ in range(n)]
    options = [option + tail for question in questions for option in question["options"]]
    option_ids, option_mask = encoding.encode_continuations(vlm_, options, end=False)  # (B·n, C)
    head_ids = encoding.encode_continuations(vlm_, [head], end=False)[0].expand(len(options), -1)  # (B·n, H)
    ids = torch.cat([head_ids, option_ids], 1)  # (B·n, H+C)
    mask = torch.cat([torch.ones_like(head_ids), option_mask], 1)  # (B·n, H+C)
    scored = torch.cat([torch.zeros_like(head_ids), option_mask], 1)  # (B·n, H+C)
    prompts = prompts.to(vlm_.device)  # (B, P)
    with torch.no_grad():
        states = vlm.hidden_states(vlm_, prompts, ids, mask, owner)
        # Zero for the tokens that are not scored.
        logps, _ = vlm.token_logps(vlm_, prompts, ids, scored, states=states)  # (B·n, H+C)
    found = zip(logps.double().sum(1).split(numbers), scored.sum(1).split(numbers))
    return [(sums.tolist(), tokens.tolist()) for sums, tokens in found]
