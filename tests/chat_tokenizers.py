"""Small tokenizers that merge as those of large models do, with the special tokens of chat formats."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"]
SPECIALS += ["<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|im_sep|>", "<|end|>", "<|end_of_turn|>"]
CORPUS = [
    "Why is the sky blue? The sky is blue.\n\nBecause of the air.\n- One.\n- Two.\n\n\n### Instruction:\nAdd 1 and 2.",
    "### Response:\n3.\n\n### Human: Who are you? ### Assistant: A model. USER: Hi ASSISTANT: Hello user, assistant",
    "[INST] Count to 3 [/INST] 1 2 3\nuser\nmodel\nassistant\nsystem\n>>> User: a\n>>> Assistant: b GPT4 Correct: c",
] * 4


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Merges across letters, punctuation and newlines, as those of Llama 3, Qwen and Phi 4 do."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    return finished(built)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A space begins each word and merges with it, as in those of Llama 2, Mistral and Gemma."""
    built = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=True, unk_token="</s>"))
    lines = pre_tokenizers.Split("\n", "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIALS, initial_alphabet=list("zq0456789"))
    )
    return finished(built)


def finished(built: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with the special tokens; it adds a begin token."""
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": SPECIALS[3:]})
    return made
