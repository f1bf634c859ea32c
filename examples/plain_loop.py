"""Train in plain PyTorch: packed documents, exact gradient accumulation, a learning rate of its own for embeddings."""

import argparse
from itertools import islice, pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unsloth_fast import backends, models


def train(model, documents, training, cross_entropy, *, capacity=64, accumulation=4) -> None:
    """Train once on lists of tokens, in steps of `accumulation` rows of up to `capacity` tokens."""
    plan = training.pack([len(document) for document in documents], capacity)
    spans = zip(plan.documents, plan.starts, plan.lengths, strict=True)
    packed = [{"input_ids": documents[index][start : start + length]} for index, start, length in spans]
    rows = (training.collate(packed[first:last]).to(model.device) for first, last in pairwise(plan.offsets))
    optimizer = torch.optim.AdamW([g.as_dict() for g in training.param_groups(model, lr=1e-2, embedding_lr=1e-3)])
    while window := list(islice(rows, accumulation)):
        targets = training.count_targets(row.labels for row in window)  # of the whole step
        step_loss = 0.0
        for row in window:
            logits = model(**row.as_dict() | {"labels": None}).logits
            loss = training.next_token_loss(logits, row.labels, cross_entropy=cross_entropy, num_items=targets)
            loss.backward()
            step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {step_loss:.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto", help="auto, fast or reference")
    backend = backends.resolve(parser.parse_args().backend)
    torch.manual_seed(0)
    tiny = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(tiny).to("cuda" if torch.cuda.is_available() else "cpu")
    models.place(model, backend)
    train(model, [list(name.encode()) for name in dir(str)], backend.training, backend.kernels.cross_entropy)
