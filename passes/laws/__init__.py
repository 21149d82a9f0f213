"""How each operation acts on a convolution's form."""
