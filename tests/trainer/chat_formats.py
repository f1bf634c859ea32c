"""The bytes that the model cards of chat formats document."""

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
MAPPING = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(entry["role"], "system"), "value": entry["content"]}
    for entry in MESSAGES
]
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
VICUNA_OLD = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
UNSLOTH = "You are a helpful assistant to the user"

# Per format: the system's turn, that of a conversation without one, both turns of user and assistant, and the
# generation prompt; <s> and </s> are the tokenizer's begin and end tokens.
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n",
    "",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    "<|im_start|>assistant\n",
)
LLAMA_3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "4<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
LLAMA_3_1 = (
    f"<s><|start_header_id|>system<|end_header_id|>\n\n{DATE}Be brief.<|eot_id|>",
    f"<s><|start_header_id|>system<|end_header_id|>\n\n{DATE}<|eot_id|>",
    *LLAMA_3_TURNS,
)
PHI_3 = (
    "<|system|>\nBe brief.<|end|>\n",
    "",
    "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n",
    "<|user|>\n2+2?<|end|>\n<|assistant|>\n4<|end|>\n",
    "<|assistant|>\n",
)
GEMMA_TURNS = (
    "Hi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n",
    "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
    "<start_of_turn>model\n",
)
GEMMA_3 = ("<s><start_of_turn>user\nBe brief.\n\n", "<s><start_of_turn>user\n", *GEMMA_TURNS)
BYTES: dict[str, tuple[str, str, str, str, str]] = {
    "chatml": CHATML,
    "yi-chat": CHATML,
    "qwen3-instruct": CHATML,
    "qwen3": (*CHATML[:3], CHATML[3].replace("4", "<think>\n\n</think>\n\n4"), CHATML[4]),
    "qwen3-thinking": (*CHATML[:3], CHATML[3].replace("4", "<think>\n\n</think>\n\n4"), CHATML[4] + "<think>\n"),
    "qwen-2.5": (CHATML[0], CHATML[0].replace("Be brief.", QWEN), *CHATML[2:]),
    "llama-3": ("<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", "<s>", *LLAMA_3_TURNS),
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_1,
    "llama-3.3": LLAMA_3_1,
    "llama": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n",
        "<s>[INST] ",
        "Hi [/INST] Hello </s>",
        "<s>[INST] 2+2? [/INST] 4 </s>",
        "",
    ),
    "mistral": ("<s>[INST] Be brief.\n\n", "<s>[INST] ", "Hi [/INST]Hello</s>", "[INST] 2+2? [/INST]4</s>", ""),
    "gemma": GEMMA_3,
    "gemma2": GEMMA_3,
    "gemma-3": GEMMA_3,
    "gemma-3n": GEMMA_3,
    "phi-3": PHI_3,
    "phi-3.5": PHI_3,
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|>",
        "",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello<|im_end|>",
        "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>4<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n",
        "",
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n",
        "<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n",
        "<|assistant|>\n",
    ),
    "vicuna": (
        "<s>Be brief. ",
        f"<s>{VICUNA} ",
        "USER: Hi ASSISTANT: Hello</s>",
        "USER: 2+2? ASSISTANT: 4</s>",
        "ASSISTANT:",
    ),
    "vicuna_old": (
        "<s>Be brief.",
        f"<s>{VICUNA_OLD}",
        "\n### Human: Hi\n### Assistant: Hello</s>",
        "\n### Human: 2+2?\n### Assistant: 4</s>",
        "\n### Assistant:",
    ),
    "alpaca": (
        "<s>Be brief.",
        f"<s>{ALPACA}",
        "\n\n### Instruction:\nHi\n\n### Response:\nHello</s>",
        "\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>",
        "\n\n### Response:\n",
    ),
    "unsloth": (
        "<s>Be brief.\n",
        f"<s>{UNSLOTH}\n",
        ">>> User: Hi\n>>> Assistant: Hello</s>\n",
        ">>> User: 2+2?\n>>> Assistant: 4</s>\n",
        ">>> Assistant: ",
    ),
    "starling": (
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>",
        "<s>",
        "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello<|end_of_turn|>",
        "GPT4 Correct User: 2+2?<|end_of_turn|>GPT4 Correct Assistant: 4<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
}
BYTES["llama-2"] = BYTES["llama"]
