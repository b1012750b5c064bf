#!/usr/bin/env bash
# Qwen2.5-VL-7B on OmniMedVQA, three cycles, LoRA adapters learn (pip install peft): one GPU of 48 GB.
#
# Estimated, not measured: 27.7 GB in SFT, 35.6 GB in GRPO, 62 hours a cycle of 50,000 samples.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
export OUT=${OUT:-runs/omni_7b_lora} GPU_GB=48 DISK_GB=${DISK_GB:-200}
export PLANS="sft-7b-lora grpo-7b-lora"
SFT_FLAGS="--lora 32 --lr 1e-4 --batch 32 --micro-batch 1"
# The reference of the KL term is the policy without its adapter, which needs no memory.
GRPO_FLAGS="--lora 32 --kl 0.01 --lr 1e-5 --prompts 16 --rollout-batch 4 --micro-batch 1 --micro-group 1"
. recipes/omnimedvqa.sh
