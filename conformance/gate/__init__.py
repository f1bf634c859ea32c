"""May a change land: two revisions judged and timed in one job on one device, or one against a committed ledger."""
