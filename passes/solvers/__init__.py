"""Pure tensor maths: how a weight is put on its grid. No graphs here."""
