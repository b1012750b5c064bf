"""Models quantised by bitsandbytes, which computes on a CPU too: they answer, score and are not trained."""

import pytest
import torch
import transformers
from helpers import ROOT
from PIL import Image

import eval
import generate
import reward
import sft
from medgr2 import encoding, loading, records, vlm
from medgr2.errors import ModelError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
SOURCE = f"{ROOT}/toy/backbone"


@pytest.fixture(scope="module", params=["load_in_8bit", "load_in_4bit"])
def quantised(request, tmp_path_factory):
    """The toy's backbone, quantised and saved by the library."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    config = transformers.BitsAndBytesConfig(**{request.param: True})
    load = transformers.AutoModelForImageTextToText.from_pretrained
    load(SOURCE, quantization_config=config).save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(SOURCE, backend="pil").save_pretrained(folder)
    return folder


def logps(name):
    """Of every token of a right answer to each of two questions."""
    loaded = loading.load(str(name), "cpu")
    images = [Image.new("RGB", (64, 64), color) for color in ("black", "white")]
    with torch.no_grad():
        ids, mask = encoding.encode_continuations(loaded, ["<answer>CT</answer>", "<answer>X-Ray</answer>"])
        inputs = encoding.encode_prompts(loaded, images, ["Which modality?", "Which side?"])
        return vlm.token_logps(loaded, inputs, ids, mask)[0][mask.bool()]


def test_its_log_probabilities_are_close_to_those_of_its_source(quantised):
    theirs, ours = logps(SOURCE), logps(quantised)
    assert ours.dtype == torch.float32 and not ours.equal(theirs)
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.95


def test_it_answers_generates_and_scores_and_the_reward_model_keeps_its_weights(
    quantised, data, tmp_path, call
):
    expert, images = data / "expert.jsonl", data / "unlabelled" / "images.jsonl"
    model = "--model", quantised
    few = "--max-new-tokens", "8"
    assert call(eval, *model, "--data", data / "test.jsonl", "--out", tmp_path / "eval", *few)[0] == 0
    # The backbone does not write candidates: they are asked for, and none is kept.
    status, _, error = call(generate, *model, "--images", images, "--out", tmp_path / "candidates", *few)
    assert status == 2 and "candidates is kept (truncated" in error
    trained = tmp_path / "reward"
    steps = "--steps", "5", "--resamples", "1"
    assert call(reward, "train", *model, "--data", expert, *steps, "--out", trained)[0] == 0
    there, here = (folder / "model.safetensors" for folder in (quantised, trained / "backbone"))
    assert here.read_bytes() == there.read_bytes()
    scored = tmp_path / "scored"
    flags = "--model", trained, "--data", expert, "--keep", "0.5", "--out", scored
    assert call(reward, "score", *flags)[0] == 0
    rewards = {row["reward"]["overall"] for row in records.read_records(scored / "scored.jsonl", root=data)}
    assert len(rewards) > 1


def test_it_is_not_trained(quantised, data, tmp_path, call):
    flags = "--model", quantised, "--data", data / "expert.jsonl", "--steps", "1", "--out", tmp_path / "x"
    status, _, error = call(sft, *flags)
    assert status == 2 and "its weights are quantised (bitsandbytes) and cannot learn" in error
    with pytest.raises(ModelError, match="cannot learn"):
        loading.freeze(loading.load(str(quantised), "cpu"), "nothing")
