"""What does each hook of the trainer do? One subject per file; `unsloth_fast/trainer.py` says when each is called."""
