"""What a model is calibrated and measured on: canvases at every noise level."""
