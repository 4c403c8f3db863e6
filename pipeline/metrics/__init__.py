"""How good a model is: one definition a file, every result in sums by sample, so that models compare in pairs."""
