"""What to change: regions, their selection, placement and edits."""
