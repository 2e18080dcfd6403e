"""Training runs: inputs, the compiled step, the loop, metrics, alarms and previews."""
