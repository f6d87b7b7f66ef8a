"""Bucket: what a step that runs as a CUDA graph has room for."""

from typing import NamedTuple

from gemcutter.schedule.plan import Plan

PROMPTS = 4  # beside decoding rows in one graph, the one that fills up included; 1024 tokens then cost 3 µs a layer


class Bucket(NamedTuple):
    """Rows of decoding come first, one token each, then prompts."""

    decodes: int
    prompts: int
    prompt_tokens: int  # of all prompts together

    @classmethod
    def of(cls, plan: Plan) -> "Bucket":
        """Room for just this plan."""
        prompt_tokens = sum(chunk.stop - chunk.start for chunk in plan.prefills)
        return cls(len(plan.decodes), len(plan.prefills), prompt_tokens)

    def with_prompt(self, tokens: int) -> "Bucket":
        """Room for one prompt more, unless it has no tokens."""
        return Bucket(self.decodes, self.prompts + 1, self.prompt_tokens + tokens) if tokens else self

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.decodes + self.prompts

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens
