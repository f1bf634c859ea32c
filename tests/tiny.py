"""Models and a tokenizer small enough to build in each test, and Hugging Face's code in float64."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(45))]

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of two layers, hidden size 32, vocabulary of `WORDS`; norm weights random, so that they matter."""
    config_class, model_class = FAMILIES[family]
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    made = model_class(config_class(**sizes | config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return made.to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`, split at spaces."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of 1 to 20 words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 45, (length,), generator=generator)) for length in lengths]


class KeepFloat64(TorchFunctionMode):
    """Makes every cast of a float64 or an integer tensor to float32 one to float64.

    transformers' norms, losses and positions are float32 whatever the model is, which hides differences below 1e-7.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `.float()` by `.double()`, and float32 by float64 in the arguments of anything else."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.float64, torch.int64):
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)
