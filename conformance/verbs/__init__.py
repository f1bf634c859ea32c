"""The verbs of the command line, one per file: each adds its parser, whose default `verb` runs it."""
