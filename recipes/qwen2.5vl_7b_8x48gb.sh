#!/usr/bin/env bash
# Qwen2.5-VL-7B on OmniMedVQA, three cycles, whole weights learn: one node of eight GPUs of 48 GB, as the paper.
#
# Estimated, not measured: 29.2 GB per GPU in SFT, 36.7 GB in GRPO, 9 hours a cycle of 50,000
# samples. Host memory: every process loads the model in fp32, 33 GB each.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
export OUT=${OUT:-runs/omni_7b} GPU_GB=48 DISK_GB=${DISK_GB:-600}
export PLANS="sft-7b-shard-8-checkpointing grpo-7b-shard-8-checkpointing"
export LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node ${GPUS:-8}}
SFT_FLAGS="--shard --gradient-checkpointing --lr 1e-5 --batch 32 --micro-batch 4"
# The default, no KL term, loads no reference.
GRPO_FLAGS="--shard --lr 1e-6 --prompts 16 --micro-batch 1 --micro-group 2 --gradient-checkpointing"
. recipes/omnimedvqa.sh
