"""The `baton` command: reads arguments, calls a flow or the store, prints."""
