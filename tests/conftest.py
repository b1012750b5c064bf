"""Set before anything imports Triton (transformers does): without a GPU its kernels run in the interpreter."""
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "toy")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
