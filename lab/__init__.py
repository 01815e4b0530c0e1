"""The experiment around the algorithm: data, flags, clocks, files, tables and plots."""
