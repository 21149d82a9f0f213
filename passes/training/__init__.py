"""Which convolutions get a block, and how the block is trained."""
