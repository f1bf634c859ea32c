"""Other people's kernels behind the contract's signatures; each needs its package, and says so when it is absent."""
