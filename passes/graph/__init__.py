"""What a network does: captured graphs and the facts about them."""
