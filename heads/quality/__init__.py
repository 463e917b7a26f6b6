"""What is wrong with the videos of a store: copies, leaks, labels that do not fit, blank videos."""
