"""Long-context tasks and how their answers are scored."""
