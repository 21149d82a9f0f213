"""What is changed about a model: edits as plain data, and how they are carried out, taken back and written down."""
