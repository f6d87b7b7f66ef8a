"""An exercise: one question with its worked solution and its answer."""

import re
from dataclasses import dataclass

from working import Step

ANSWER = "The answer is {}."
_ANSWER = re.compile(r"The answer is (-?\d+)")


@dataclass(frozen=True)
class Exercise:
    """A question, the reasoning that answers it, and the number it ends in."""

    question: str
    reasoning: str
    answer: int
    steps: tuple[Step, ...] = ()
    extra_fact: str | None = None

    @property
    def conclusion(self) -> str:
        return ANSWER.format(self.answer)

    @property
    def solution(self) -> str:
        """The reply a model should give: the working, the answer last."""
        return f"{self.reasoning}\n{self.conclusion}"

    @property
    def facts(self) -> tuple[str, ...]:
        """What has to be worked out, leaving aside what is known by heart."""
        facts = tuple(step.fact for step in self.steps if not step.by_heart)
        return facts if self.extra_fact is None else (*facts, self.extra_fact)


def calculation(question: str, step: Step) -> Exercise:
    """An exercise answered by a single bare calculation."""
    return Exercise(question, step.text, step.result, (step,))


def worked(question: str, steps: list[tuple[str, Step]]) -> Exercise:
    """An exercise answered by reasoned steps: `(what is found, calculation)`."""
    lines = [f"Step {n}: {reason}. {step.text}" for n, (reason, step) in enumerate(steps, 1)]
    calculations = tuple(step for _, step in steps)
    return Exercise(question, "\n".join(lines), calculations[-1].result, calculations)


def extract_answer(text: str) -> str | None:
    """The final answer stated in a generated text, or None if it states none."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None
