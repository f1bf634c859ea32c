"""What every test run needs before anything else is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: without a GPU the kernels run interpreted
torch.set_num_threads(1)
