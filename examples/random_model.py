"""Save a tiny Llama with random weights, and a tokenizer, to try things with: python examples/random_model.py FOLDER"""

import argparse
from pathlib import Path
from typing import Any

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def save(
    folder: Path | str, device: str = "cpu", dtype: str = "float32", model_type: str = "llama", **shape: Any
) -> str:
    """Write the model and a tokenizer with one token per byte; return the folder's path.

    Args:
        folder: created if it does not exist.
        device: where the weights are drawn, from seed 0.
        dtype: of the weights.
        model_type: of transformers, such as "llama".
        **shape: fields of the model's configuration; `TINY` where none is given.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)

    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **tokens | (shape or TINY), dtype=dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", help="created if it does not exist")
    save(parser.parse_args().folder)
