"""What: tables, artifacts, settings, metrics and errors. No torch."""
