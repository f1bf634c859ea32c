"""Mutants: copies of a backend with one fault each, made from the syntax tree, that the judge should fail.

The files, each of which uses only those above it:

    mutant       one edit, its name, its diff
    sources      which source files and functions make up an operation; importing edited copies of them
    kinds        the kinds of faults
    edits        all mutants of a file
    reach        which expressions a process executed or compiled
    examine      a mutant under the properties, in a process of its own
    equivalent   mutants that were read and confirmed to be correct
    campaign     mutants of several operations: chosen, examined, given a verdict
    report       what is printed
"""
