"""One file per operation, each with a module-level `spec`."""
