"""The algebra of convolutions: tensors in and out, no graph."""
