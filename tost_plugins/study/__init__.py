"""What a trained or a training network shows: pure functions that return rows, a dict for each line of a table."""
