"""One file a training piece."""
