"""What a run is and what is done with whole runs: start, fork, diff, verify, garbage collection, retention."""
