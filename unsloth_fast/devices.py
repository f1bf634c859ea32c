"""What this machine can compute, under the names that scripts for Unsloth ask by."""

import torch


def is_bfloat16_supported() -> bool:
    """Whether models can be trained in bfloat16: on a GPU that supports it without emulation, and on every CPU.

    Scripts choose `bf16` or `fp16` by it. On a CPU only bf16 exists.
    """
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


is_bf16_supported = is_bfloat16_supported


def is_vLLM_available() -> bool:
    """Whether vLLM can be used: never here, whether it is installed or not."""
    return False
