"""The judge: draws cases, runs any backend against `unsloth_ref`, says pass or fail with a measured error budget."""
