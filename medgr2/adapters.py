"""LoRA by peft: small matrices learn beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

A linear layer W of the language model becomes W + α/R · B A, A (R, in) and B (out, R), α = 2R. B starts at 0.
Tower, projector, embedding and head have no adapter: the losses read the head's weight themselves.
"""

import contextlib
import os
import re
from dataclasses import replace

import torch
from safetensors.torch import save_file

from medgr2 import loading
from medgr2.errors import ModelError, RunError


def load_to_train(name, device, freeze, rank=None):
    """The VLM of a folder or hub name, ready to train: what `freeze` names does not learn.

    With a rank only a LoRA adapter learns, so the weights take the dtype of the device's computations.
    """
    loaded = loading.load(name, device, loading.best_dtype() if rank else torch.float32, learns=True)
    loading.freeze(loaded, freeze)
    if rank:
        add_lora(loaded, rank, name)
    return loaded


def add_lora(loaded, rank, source):
    """Freeze the VLM and put an adapter of this rank beside each linear layer of its decoder.

    `source`: where the frozen weights come from; the adapter's config names it. Raises RunError without peft.
    """
    try:
        import peft
    except ImportError:
        raise RunError("--lora needs peft, which is not installed: pip install peft") from None
    decoder = loaded.model.get_decoder()
    prefix = next(name for name, module in loaded.model.named_modules() if module is decoder)
    linear = {n.rpartition(".")[2] for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)}
    if not linear:
        raise ModelError(f"{source}: no linear layer in its language model for --lora; train it whole")
    targets = rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(sorted(linear))})"
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, base_model_name_or_path=source
    )
    loaded.model.requires_grad_(False)
    loaded.lora = peft.LoraModel(loaded.model, config, "default")
    # peft made the adapter in the dtype of the frozen weights. In bf16 it would not learn: most of the
    # optimiser's steps round to nothing.
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    loaded.model.eval()


@contextlib.contextmanager
def without_lora(loaded):
    """Within this context the model is as before add_lora: GRPO's reference. No adapter: no change."""
    if loaded.lora is None:
        yield
        return
    loaded.lora.disable_adapter_layers()
    try:
        yield
    finally:
        loaded.lora.enable_adapter_layers()


def save_trained(loaded, folder):
    """Save a trained VLM as a plain model. An adapter is merged into it, and kept alone in folder/adapter."""
    if loaded.lora:
        save_adapter(loaded, os.path.join(folder, "adapter"))
        loaded = replace(loaded, model=loaded.lora.merge_and_unload(), lora=None)
    loading.save(loaded, folder)


def save_adapter(loaded, folder):
    """Write the adapter as peft's PeftModel.from_pretrained reads it."""
    loaded.lora.peft_config["default"].save_pretrained(folder)
    weights = {
        f"base_model.model.{name.replace('.default.', '.')}": p.detach().contiguous()
        for name, p in loaded.model.named_parameters()
        if p.requires_grad
    }
    save_file(weights, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
