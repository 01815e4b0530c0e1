"""The experiment around the algorithm: flags, data, runs, results."""
