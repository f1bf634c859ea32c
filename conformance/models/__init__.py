"""Whole models under judgement: how they are built or loaded, run, and held to the laws of conformance/laws."""
