"""A generator behind an OpenAI-compatible server: one chat completion per draft, retried while it is busy."""

import base64
import io
import re
import time
from concurrent.futures import ThreadPoolExecutor

from medgr2.errors import RunError
from medgr2.images import open_image
from medgr2.prompts import generator_prompt

# Without user and password: the URL is kept in args.json, which must hold no secret.
URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^/@:\[\]\s]+)(:\d+)?(/\S*)?")
# Seconds before the first retry; each further one waits twice as long.
FIRST_WAIT = 1.0


def connect(url, key, timeout):
    """A client of the server at `url`, with or without /v1."""
    from huggingface_hub import InferenceClient, get_session

    # A redirect could take the images to a host that the user never named.
    get_session().follow_redirects = False
    # Without any key the client would send this machine's Hugging Face token to the server.
    return InferenceClient(base_url=url.rstrip("/"), api_key=(key or "").strip() or "EMPTY", timeout=timeout)


def ask_server(drafts, client, concurrency, retries, **settings):
    """Drafts → replies [(text, truncated)], in their order; `concurrency` requests at a time.

    Raises RunError if the server refuses, or cannot be reached.
    """
    images = {path: data_url(path) for path in {draft["image"] for draft in drafts}}

    def ask(draft):
        content = [
            {"type": "image_url", "image_url": {"url": images[draft["image"]]}},
            {"type": "text", "text": generator_prompt(draft["paradigm"], draft["task"])},
        ]
        messages = [{"role": "user", "content": content}]
        return complete_chat(client, retries, messages, seed=draft["seed"], **settings)

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, drafts))


def data_url(path):
    """The image as a PNG in a data URL: the pixels that a model on this machine would get, no metadata."""
    png = io.BytesIO()
    open_image(path).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def complete_chat(client, retries, messages, **settings):
    """One chat completion → (text, truncated). Retried after a lost connection, a time-out, a 429 or a 5xx.

    Raises RunError at any other 4xx, if the reply is no chat completion, and when the retries are used up.
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
            problem = "its reply is no chat completion (a redirect is not followed)"
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
