"""Operations that the project does not have: their references, and wrong and right kernels of each."""
