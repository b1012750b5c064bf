"""A model behind an OpenAI-compatible server: one chat completion per request, retried while it is busy."""

import base64
import functools
import io
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from medgr2 import cli
from medgr2.errors import RunError

# Without user and password: the URL is kept in args.json, which must hold no secret.
URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^/@:\[\]\s]+)(:\d+)?(/\S*)?")
# Flags of add_arguments that change no output.
FREE = ("concurrency", "retries", "timeout")
# Seconds before the first retry; each further one waits twice as long.
FIRST_WAIT = 1.0


class Request(NamedTuple):
    """One question to the server. image: PIL, RGB; seed: 31 bits, because servers take no more."""

    image: object
    text: str
    seed: int


def add_arguments(parser, which, who):
    """Add --endpoint to the group `which` and its settings to the parser. who: the model's role, for help."""
    which.add_argument("--endpoint", metavar="URL", help="or base URL of an OpenAI-compatible server")
    parser.add_argument("--endpoint-model", metavar="NAME", help=f"{who}'s name on that server")
    key = "environment variable with the server's API key, if it needs one"
    parser.add_argument("--endpoint-key-env", default="OPENAI_API_KEY", metavar="VARIABLE", help=key)
    count = cli.number(int, 1)
    side = "longest side, in pixels, of an image sent to the server; larger images are scaled down"
    parser.add_argument("--endpoint-side", type=count, default=2048, help=side)
    parser.add_argument("--concurrency", type=count, default=8, help="requests at a time")
    parser.add_argument(
        "--retries", type=cli.number(int, 0), default=6, help="retries after no reply, a 429 or a 5xx"
    )
    parser.add_argument(
        "--timeout", type=cli.number(float, 1), default=300, help="seconds to wait for a reply"
    )


def check_arguments(parser, args):
    """Leave with a one-line error if the flags of add_arguments do not go together."""
    if bool(args.endpoint) != bool(args.endpoint_model):
        parser.error("--endpoint and --endpoint-model go together")
    if args.endpoint and not URL.fullmatch(args.endpoint):
        form = "a URL like http://host:8000 or https://host/v1, without user and password"
        parser.error(f"--endpoint: give {form}")
    if args.endpoint and (args.min_pixels or args.max_pixels):
        parser.error(
            "--min-pixels, --max-pixels: the server resizes images; --endpoint-side limits what it gets"
        )


def connect(args):
    """ask_server for the server of these arguments: ask(requests, temperature=..., max_tokens=...)."""
    from huggingface_hub import InferenceClient, get_session

    # A redirect could take the images to a host that the user never named.
    get_session().follow_redirects = False
    # Without any key the client would send this machine's Hugging Face token to the server.
    key = (os.environ.get(args.endpoint_key_env) or "").strip() or "EMPTY"
    client = InferenceClient(base_url=args.endpoint.rstrip("/"), api_key=key, timeout=args.timeout)
    settings = {"concurrency": args.concurrency, "retries": args.retries, "side": args.endpoint_side}
    return functools.partial(ask_server, client=client, model=args.endpoint_model, **settings)


def ask_server(requests, client, concurrency, retries, side, **settings):
    """Requests → replies [(text, truncated)], in their order; `concurrency` requests at a time.

    Raises RunError if the server refuses, or cannot be reached.
    """
    # Requests about one image share it.
    images = {id(request.image): request.image for request in requests}
    urls = {key: data_url(image, side) for key, image in images.items()}

    def ask(request):
        content = [
            {"type": "image_url", "image_url": {"url": urls[id(request.image)]}},
            {"type": "text", "text": request.text},
        ]
        messages = [{"role": "user", "content": content}]
        return complete_chat(client, retries, messages, seed=request.seed, **settings)

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, requests))


def data_url(image, side):
    """The image as a PNG in a data URL: the pixels that a model on this machine would get, no metadata.

    One larger than `side` x `side` pixels is made to fit.
    """
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def complete_chat(client, retries, messages, **settings):
    """One chat completion → (text, truncated). Retried after a lost connection, a time-out, a 429 or a 5xx.

    Raises RunError at any other 4xx, if the reply is not a chat completion, or if the retries are used up.
    """
    # The base class of whichever HTTP library the hub's version uses.
    from huggingface_hub.errors import HTTPError

    for attempt in range(retries + 1):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            choice = client.chat_completion(messages, **settings).choices[0]
            # JSON may hold half a surrogate pair, which UTF-8 cannot.
            text = (choice.message.content or "").encode(errors="replace").decode()
            return text, choice.finish_reason == "length"
        except (HTTPError, OSError) as error:
            status, problem = describe_failure(error, client.token)
            if status is not None and status != 429 and status < 500:
                advice = "check --endpoint, --endpoint-model and the API key"
                raise RunError(f"{client.model}: {problem}; {advice}") from None
        except (ValueError, TypeError, AttributeError, LookupError):
            problem = "its reply is not a chat completion (redirects are not followed)"
            raise RunError(f"{client.model}: {problem}; check --endpoint") from None
    advice = f"gave up after {retries} retries, the same command resumes from here"
    raise RunError(f"{client.model}: {problem}; {advice}")


def describe_failure(error, key):
    """(HTTP status or None, the problem in one line, without the key)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = str(error)
    if status is not None:
        message = f"HTTP {status} {getattr(error, 'server_message', None) or ''}"
    return status, " ".join(message.split())[:300].replace(key, "***")
