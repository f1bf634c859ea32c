"""One file an operation, each with a module-level `spec`."""
