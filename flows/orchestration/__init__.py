"""All that knows Prefect, beside the three flows: tasks, its page, automations, the work pool."""
