"""How many wrong kernels the judge finds, beside the tests of correctness of other projects."""
