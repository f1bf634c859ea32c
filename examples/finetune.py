"""Fine-tune a language model on six sentences: python examples/finetune.py [MODEL]

MODEL is the name or the path of a model; without it the script makes a tiny one. A laptop's CPU is enough for that.
"""

import argparse
import logging

import random_model
import torch
from datasets import Dataset

from unsloth_fast import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
parser.add_argument("model", nargs="?", help="its name or path (default: a tiny one)")
name = parser.parse_args().model or random_model.save("out/tiny_llama")
gpu = torch.cuda.is_available()
logging.basicConfig(format="%(message)s")
logging.getLogger("unsloth_fast").setLevel(logging.INFO)  # shows which operations run, and what is left as it is

model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=256, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16)

dataset = Dataset.from_dict({"text": [f"Question: what is {n} plus {n}? Answer: {n + n}." for n in range(1, 7)]})
args = UnslothTrainingArguments(
    output_dir="out/finetune", packing=True, max_steps=10, learning_rate=1e-3, logging_steps=1,
    bf16=gpu, use_cpu=not gpu,
)  # fmt: skip
trainer = UnslothTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=args)
trainer.train()
trainer.save_model()
print('The adapter is in out/finetune. FastLanguageModel.from_pretrained("out/finetune") loads it with its model.')
