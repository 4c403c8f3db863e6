"""The two reference models `builtin:tiny-llada` and `builtin:tiny-dream`: their problems, tokenizer and training."""
