"""When and where: runs, their store, the flows that chain stages, and the command line."""
