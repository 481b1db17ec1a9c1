"""All that knows Prefect, beside the four flows: tasks, its page, automations, work pools."""
