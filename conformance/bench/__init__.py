"""Speed, measured on results that are right."""
