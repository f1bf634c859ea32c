"""The training pieces, one file per piece."""
