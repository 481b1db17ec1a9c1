"""What stages are made of: models, sampling, formulas, learners."""
