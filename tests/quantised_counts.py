"""What PT2E makes of a network before and after collapse: ``python tests/quantised_counts.py``; needs torchao."""
# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import sys
import warnings
from collections import Counter
from typing import Any

import timm
import torch

import reparam
from zoo.render import markdown_table

KINDS = {"convs": "aten.conv", "norms": "aten.batch_norm", "quantise and dequantise": "quantized_decomposed."}


def quantised(program: Any, x: torch.Tensor) -> Any:
    """The program in int8 for x86 processors, calibrated on one batch."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def counts(module: Any) -> dict[str, int]:
    """How many calls of each kind the graph has."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return {kind: sum(n for name, n in calls.items() if name.startswith(start)) for kind, start in KINDS.items()}


def main(name: str) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        rows = []
        for title, each in (("as exported", program), ("collapsed", reparam.collapse(program))):
            rows.append([title, *map(str, counts(quantised(each, x)).values())])
    print(f"{name}, int8 by PT2E\n\n{markdown_table(('program', *KINDS), rows)}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["repvgg_a0"]))
