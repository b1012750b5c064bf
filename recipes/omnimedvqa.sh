# Sourced by the recipes: the records of OmniMedVQA, what all recipes have in common, and cycle.sh.
#
# NONE OF THEM HAS BEEN RUN AT ITS SIZE. docs/scale.md has the memory plan and what was tried.
#
#   DRY_RUN=1 OMNIMEDVQA=path/to/OmniMedVQA bash recipes/NAME.sh    prepares the records, then checks all else:
#                                                                   files, flags, free disk, the memory plan
#   OMNIMEDVQA=path/to/OmniMedVQA bash recipes/NAME.sh              runs it; the same command resumes it
OMNIMEDVQA=${OMNIMEDVQA:-OmniMedVQA}            # the data set, with its folder QA_information
DATA=${DATA:-data}                              # record files to write
[ -d "$OMNIMEDVQA/QA_information" ] ||
  { echo "$0: OMNIMEDVQA=$OMNIMEDVQA: no folder QA_information in it; correct it" >&2; exit 2; }
. ./setup.sh requirements.txt

export CYCLES=${CYCLES:-3} SEED=${SEED:-0} POLICY=$MODEL GENERATOR=$MODEL
export REWARD_BACKBONE=${REWARD_BACKBONE:-Qwen/Qwen2.5-VL-3B-Instruct}
# 512 tokens of an image at most (docs/scale.md); the next ones are prepared by 4 processes per GPU.
images="--max-pixels 401408 --workers 4"
export GENERATE_FLAGS="--max-new-tokens 512 --batch 4 $images"
export REWARD_FLAGS="--batch 4 $images"
export SCORE_FLAGS="--keep 0.5 --batch 4 $images"
export GENERATOR_FLAGS="$SFT_FLAGS --epochs 1 $images"
export SFT_FLAGS="$SFT_FLAGS --epochs 2 $images"
export GRPO_FLAGS="$GRPO_FLAGS --steps 500 --max-new-tokens 512 --watch-every 50 $images"
export MORE_FLAGS="--lr 3e-6"
export EVAL_FLAGS="--max-new-tokens 512 --batch 16 $images"

records() { "$PYTHON" -m medgr2.records "$@"; }
[ -e "$DATA/omni.jsonl" ] ||
  records import "$OMNIMEDVQA/QA_information" --images "$OMNIMEDVQA" --out "$DATA/omni.jsonl"
# 5% of the images for the experts, 75% as the unlabelled pool, 20% to test on.
[ -e "$DATA/test.jsonl" ] ||
  records split "$DATA/omni.jsonl" --image-root "$OMNIMEDVQA" --out "$DATA" \
    --train 0.05 --val 0.75 --test 0.2 --seed 0
# A hundredth of the pool is for the watch.
[ -e "$DATA/rest/val.jsonl" ] ||
  records split "$DATA/val.jsonl" --image-root "$OMNIMEDVQA" --out "$DATA/rest" \
    --train 0.99 --val 0.01 --test 0 --seed 0

export EXPERT=$DATA/train.jsonl IMAGES=$DATA/rest/train.jsonl IMAGE_ROOT=$OMNIMEDVQA
export VAL=$DATA/rest/val.jsonl TEST=$DATA/test.jsonl
exec bash cycle.sh
