"""What performs the calls of a run that this process does not: processes beside it, a Ray cluster, work pools."""
