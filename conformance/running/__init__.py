"""From a question to verdicts: which checks there are, which cases are drawn for each, and where they run.

`catalogue` lists the checks that a backend has. `runner` runs them in worker processes. `search` draws the cases of one
check and shrinks the first that fails. `coverage` finds cases for the paths through kernels that random cases miss.
"""
