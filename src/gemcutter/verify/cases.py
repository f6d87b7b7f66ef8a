"""Every op at every released shape.

`experts` and `attend` are not here: their matrix products are held to float64 by their tests, not to bits.
"""

from gemcutter.verify.case import Case
from gemcutter.verify.norms import norm_cases


def all_cases() -> list[Case]:
    return norm_cases()
