"""Speed, measured only for correct results."""
