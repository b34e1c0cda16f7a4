"""Tasks of lm-evaluation-harness, beside the baseline on the same documents."""
