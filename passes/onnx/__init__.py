"""Collapse of ONNX files: reading them in the terms of the table of operations, running parts, writing."""
