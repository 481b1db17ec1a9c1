"""How: one pure function a stage, values in, values out. No path, clock, Prefect or MLflow."""
