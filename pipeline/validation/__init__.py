"""The proof that an exported graph does what the model does: nodes, whole passes, quality, golden records."""
