"""The judge: draws cases, runs any backend against `unsloth_ref`, and says pass or fail with a measured error budget."""
