"""`dllmc outliers`: what stands out in the inputs of every linear, masked and unmasked rows apart."""
