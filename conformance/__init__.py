"""The judge: draws cases, compares any backend with `unsloth_ref`, reports pass or fail and the error budget used."""
