"""Tiny random models of every kind of every family."""

import tiny_glm
import tiny_models

KINDS = [*tiny_models.KINDS, *tiny_glm.KINDS]


def make(kind: str, *args, **changes):
    return (tiny_glm if kind in tiny_glm.KINDS else tiny_models).make(kind, *args, **changes)
