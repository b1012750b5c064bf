"""README.md of a trained model's folder: what it was made from, on which data, how, and with what result.

With --push-to-hub the finished folder goes to the Hugging Face Hub, without its records.
"""

import os
import shlex
import sys

from medgr2 import cli
from medgr2.errors import RunError, in_one_line

# What is not pushed: records and responses, which may tell of patients, and what only this machine needs.
KEPT_HERE = ["*.jsonl", "args.json", "tensorboard/*", "wandb/*"]
# The fields on the licence, which are copied from the base's card.
LICENCE = ("license", "license_name", "license_link")
CARD = """---
{header}
---
# {name}

{what} trained by `{script}` from `{base}` with a reference implementation of MedGR2
([paper](https://doi.org/10.1609/aaai.v40i34.40125)). {licence}
For research, not for clinical use.

## Use

{use}

## Training

```
{command}
```

Code: commit `{commit}`, {versions}.

{data}

## Result

{result}
"""
USE_MODEL = """```python
import transformers

model = transformers.AutoModelForImageTextToText.from_pretrained("{name}")
processor = transformers.AutoProcessor.from_pretrained("{name}")
```"""
USE_REWARD_MODEL = "`reward.py score --model {name}`. The folder `backbone` is a Hugging Face model."


def write_card(part, folder, metadata, result):
    """Write `part`/README.md. folder: the run's final name; metadata: of args.json; result: of metrics.json.

    Nothing in it depends on a clock, so that a resumed run writes the same bytes.
    """
    from huggingface_hub import ModelCardData

    # The name to load it by: the Hub's if it goes there.
    base, name = metadata["args"]["model"], metadata["args"]["push_to_hub"] or folder
    known = read_header(base)
    header = {field: known[field] for field in LICENCE if field in known}
    # The Hub takes only its own names here, so a local base passes on what its own card says.
    header["base_model"] = known.get("base_model") if os.path.isdir(base) else base
    is_model = os.path.isfile(os.path.join(part, "config.json"))
    if is_model:
        header |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    licence = " ".join(" ".join(str(header[field]).split()) for field in LICENCE if field in header)
    # A folder's hash would depend on the clock in its args.json.
    files = [(path, digest) for path, digest in metadata["inputs"].items() if os.path.isfile(path)]
    numbers = [(key, value) for key, value in result.items() if type(value) in (int, float, str)]
    text = CARD.format(
        header=ModelCardData(**header).to_yaml(),
        name=name,
        what="Vision-language model" if is_model else "Reward model",
        script=metadata["script"],
        base=base,
        licence=f"Licence of the base: {licence}." if licence else "The base names no licence.",
        use=(USE_MODEL if is_model else USE_REWARD_MODEL).format(name=name),
        command=shlex.join(["python", metadata["script"], *sys.argv[1:]]),
        commit=metadata["git"]["commit"] or "unknown",
        versions=", ".join(f"{package} {version}" for package, version in metadata["versions"].items()),
        data=cli.format_table(files, ["data", "SHA-256"], markdown=True),
        result=cli.format_table(numbers, ["metric", "value"], markdown=True),
    )
    with open(os.path.join(part, "README.md"), "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def read_header(model):
    """The YAML header of the card of a folder or hub name; {} if it has none that can be read."""
    from huggingface_hub import ModelCard

    path = os.path.join(model, "README.md") if os.path.isdir(model) else model
    if os.path.isdir(model) and not os.path.isfile(path):
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # No network, no card, no YAML: each has its own exception, and the model is trained already.
        return {}


def make_repository(name):
    """Make the repository, private if it is new, so that a mistake shows before the training.

    Raises RunError.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:
        # No network, no token, no such name: each has its own exception.
        advice = "give OWNER/NAME after `hf auth login`, or leave it out"
        raise RunError(f"--push-to-hub {name}: {in_one_line(error)}; {advice}") from None


def push(folder, name):
    """Upload a finished folder to its repository on the Hub. Raises RunError; the folder stays complete."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[*KEPT_HERE])
    except Exception as error:
        # As above.
        again = f"hf upload {name} {folder} --exclude {' '.join(map(repr, KEPT_HERE))}"
        raise RunError(f"{folder}: complete, but not pushed: {in_one_line(error)}; try `{again}`") from None
