"""The contract: every piece of fine-tuning written once, slowly, in pure PyTorch.

`unsloth_ref.kernels` holds the operations, `unsloth_ref.training` the pieces of a training step. Everything here runs
in float64, imports only torch and the standard library, and is what `unsloth_fast` is judged against.
"""
