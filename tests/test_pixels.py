"""--min-pixels and --max-pixels: how large an image is when a model sees it, in every stage."""

import json

import pytest
from helpers import few, put_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_vlm import build_onevision, build_qwen

import eval as evaluation
import generate
import grpo
import reward
import sft
from medgr2 import context, encoding, loading
from medgr2.errors import RunError
from medgr2.images import fit_pixels

side = st.integers(30, 600)


@few
@given(side, side, st.integers(784, 90_000), st.integers(2, 9))
def test_an_image_is_resized_into_the_limits_and_keeps_its_proportions(width, height, least, times):
    most = times * least
    fitted = fit_pixels(Image.new("L", (width, height)), least, most)
    pixels = fitted.width * fitted.height
    assert pixels <= most and (pixels >= min(least, width * height) or width * height > most)
    wanted = min(max(width * height, least), most)
    scale = (wanted / (width * height)) ** 0.5
    assert abs(fitted.width - scale * width) <= 1 and abs(fitted.height - scale * height) <= 1


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of a small Qwen2.5-VL: a token of an image is 8 x 8 pixels, and it has 1 to 16 of them."""
    folder = tmp_path_factory.mktemp("qwen")
    build_qwen(folder, "Qwen2_5_")
    return folder


def count_image_tokens(loaded, size):
    inputs = encoding.encode_prompts(loaded, [Image.new("RGB", size)], ["?"])
    return int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())


def test_the_limits_of_a_qwen_are_its_processors_and_a_saved_model_has_those_of_its_source(qwen, tmp_path):
    loaded = loading.load(str(qwen))
    assert count_image_tokens(loaded, (64, 64)) == 16
    for limits, size, tokens in [
        ((None, 256), (64, 64), 4),
        ((None, 4096), (64, 64), 64),
        ((1024, 4096), (16, 16), 16),
        # Beyond the processor's own other limit.
        ((2048, None), (16, 16), 36),
    ]:
        loading.limit_pixels(loaded, *limits)
        assert count_image_tokens(loaded, size) == tokens
    loading.save(loaded, tmp_path / "saved")
    name = "preprocessor_config.json"
    assert (tmp_path / "saved" / name).read_bytes() == (qwen / name).read_bytes()
    assert count_image_tokens(loading.load(str(tmp_path / "saved")), (64, 64)) == 16
    with pytest.raises(RunError, match="--min-pixels 900 is above --max-pixels 800"):
        loading.limit_pixels(loaded, 900, 800)


def test_another_models_image_is_resized_and_the_largest_is_told_before_the_run(tmp_path, capsys):
    build_onevision(tmp_path / "onevision")
    loaded = loading.load(str(tmp_path / "onevision"))
    # Two tiles and the whole, or one.
    wide = put_image(tmp_path / "wide.png", size=(32, 16))
    context.tell_image_tokens(loaded, [wide, put_image(tmp_path / "small.png", size=(8, 8))])
    before = count_image_tokens(loaded, (32, 16))
    loading.limit_pixels(loaded, 1600, None)
    sizes = [image.shape for image in encoded_pixels(loaded, (32, 16))]
    assert f"an image has up to {before} tokens (one of 32 x 16 pixels)" in capsys.readouterr().out
    assert sizes == [image.shape for image in encoded_pixels(loaded, (57, 29))]


def encoded_pixels(loaded, size):
    return encoding.encode_prompts(loaded, [Image.new("RGB", size)], ["?"])["pixel_values"]


def test_every_stage_shows_images_of_the_size_that_its_flags_say(qwen, data, tmp_path, call, monkeypatch):
    encode, seen = encoding.encode_prompts, {}

    def spy(loaded, images, *rest, **options):
        inputs = encode(loaded, images, *rest, **options)
        counts = (inputs["input_ids"] == loaded.model.config.image_token_id).sum(1).tolist()
        # The blank images of the checks at loading come before the limits.
        drawn = [n for n, image in zip(counts, images) if len(image.getcolors(5000)) > 1]
        seen.setdefault(loaded.source, set()).update(drawn)
        return inputs

    monkeypatch.setattr(encoding, "encode_prompts", spy)
    expert, limit = data / "expert.jsonl", "--max-pixels 784"
    rm = tmp_path / "rm"
    for script, flags in [
        (reward, f"train --data {expert} --resamples 1 --steps 1 --holdout 0.4 --out {rm}"),
        (reward, f"score --data {expert} --model {rm} --keep 0.5 --out {tmp_path}/score"),
        (sft, f"--data {expert} --steps 1 --out {tmp_path}/sft"),
        (grpo, f"--data {expert} --reward {rm} --steps 1 --prompts 2 --group 2 --max-new-tokens 2 "
               f"--min-spread -1 --kl 0.1 --out {tmp_path}/grpo"),
        (evaluation, f"--data {expert} --max-new-tokens 2 --out {tmp_path}/eval"),
        # Random weights write no candidate, which ends the run, at its end.
        (generate, f"--images {data}/unlabelled/images.jsonl --max-new-tokens 2 --out {tmp_path}/gen"),
    ]:  # fmt: skip
        seen.clear()
        model = "" if "--model" in flags else f" --model {qwen}"
        status, out, err = call(script, flags + model + " " + limit)
        assert status == (2 if script is generate else 0), err
        assert "an image has up to 9 tokens (one of 64 x 64 pixels)" in out
        assert set(seen) == {str(qwen), f"{rm}/backbone"} if script is grpo else len(seen) == 1
        assert all(counts == {9} for counts in seen.values()), (script, seen)
    assert json.loads((tmp_path / "eval" / "args.json").read_text())["args"]["max_pixels"] == 784
