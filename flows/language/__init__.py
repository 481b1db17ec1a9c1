"""A language model's run: its chain of stages, the tasks that do them, its models."""
