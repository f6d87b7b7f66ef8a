"""Every op at every released shape.

`linear`, `gate_up`, the seams that begin a product, `experts` and `attend` are not here: their tests hold matrix
products to cuBLASLt's bits, to the ops one by one, or to float64.
"""

from dataclasses import replace

import torch

from gemcutter.verify.activations import activation_cases, fp8_cases
from gemcutter.verify.attention import attention_cases
from gemcutter.verify.case import Case
from gemcutter.verify.embeddings import embedding_cases
from gemcutter.verify.glm import glm_cases
from gemcutter.verify.norms import norm_cases
from gemcutter.verify.routing import routing_cases


def all_cases() -> list[Case]:
    """In bfloat16, an op's shapes together; and in float32 and float16 an op's first."""
    families = norm_cases, attention_cases, routing_cases, activation_cases, embedding_cases, fp8_cases, glm_cases
    by_op: dict[str, list[Case]] = {}
    for family in families:
        for case in family():
            by_op.setdefault(case.op, []).append(case)
    for cases in by_op.values():
        cases += [replace(cases[0], dtype=dtype) for dtype in (torch.float32, torch.float16)]
    return [case for cases in by_op.values() for case in cases]
