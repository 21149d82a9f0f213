"""What reparam runs on: networks, tables and benchmarks. Needs the extra ``zoo`` (timm, torchvision)."""
