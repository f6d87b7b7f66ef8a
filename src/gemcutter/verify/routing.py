"""Cases of the experts' selection and of the sort by expert."""

from gemcutter.ops.moe.select_experts import select_experts_launch, select_experts_reference
from gemcutter.ops.moe.sort_by_expert import sort_by_expert_launch, sort_by_expert_reference
from gemcutter.verify import cuda_arithmetic
from gemcutter.verify.case import Case
from gemcutter.verify.inputs import Draw
from gemcutter.verify.shapes import GEMMA, GLM, Experts


def routing_cases() -> list[Case]:
    shapes = [(model.name, model.experts) for model in GEMMA if model.experts]
    shapes.append(("widest", Experts(1024, 32, 0)))
    cases = [case for name, experts in shapes for case in (_selection(name, experts), _sort(name, experts))]
    return [*cases, _sort(GLM.name, GLM.experts)]


def _selection(name: str, experts: Experts) -> Case:
    count, top_k, _ = experts
    return Case(
        "select_experts", f"{name} {top_k} of {count}",
        lambda draw: (draw.rows(count), draw.weight(count), top_k),
        select_experts_launch, select_experts_reference,
        lambda rows: rows * (count * 2 + top_k * (8 + 4)) + count * 2,
        stand_in=cuda_arithmetic.select_experts,
    )  # fmt: skip


def _sort(name: str, experts: Experts) -> Case:
    count, top_k, _ = experts

    def arguments(draw: Draw) -> tuple:
        """What the kind's logits choose: evenly, or the same few experts for all."""
        return draw.rows(count).float().nan_to_num().topk(top_k, -1).indices, count

    return Case(
        "sort_by_expert", f"{name} {top_k} of {count}", arguments,
        sort_by_expert_launch, sort_by_expert_reference,
        lambda rows: rows * top_k * (8 + 4) + (count + 1) * 4,
    )  # fmt: skip
