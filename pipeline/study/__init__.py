"""The study: a grid of models, methods, bits, states and seeds, measured on the same tasks, with tables and plots."""
