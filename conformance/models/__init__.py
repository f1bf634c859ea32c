"""Whole models under judgement: how they are built or loaded, run, and tested by the laws of conformance/laws."""
