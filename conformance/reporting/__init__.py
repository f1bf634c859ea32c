"""What becomes of verdicts: which failures are known, and what a person and a program read.

`deviations` knows the failures that a backend declares. `report` prints the progress, the table and the failures of a
run. `results_file` writes and reads the JSON files of all verbs; conformance/page makes pages and comments of them.
"""
