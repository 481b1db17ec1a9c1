"""A control task's run: its chain of stages, the tasks that do them, its environments and policies."""
