"""Messages arrive as they were sent."""

from array import array

import pytest
from drive import request

from gemcutter.schedule.request import Update
from gemcutter.serve import wire


@pytest.mark.parametrize("ids", [[7], [0, 262_143, 2**31 - 1, -(2**31)], [], list(range(5000))])
def test_a_prompt_arrives_as_an_array_of_c_ints(ids):
    sent = wire.Submit(
        requests=[request("a", ids, seed=2**63 - 1, stop_ids=(1, 5), max_tokens=3), request("b", [1])]
    )
    came = wire.to_engine.decode(wire.encode(sent))
    assert came == sent
    assert isinstance(came.requests[0].prompt_ids, array) and came.requests[0].prompt_ids.typecode == "i"
    assert came.requests[0].prompt_ids.tolist() == ids


def test_a_prompt_travels_in_four_bytes_a_token():
    short, long = (len(wire.encode(wire.Submit(requests=[request("a", [9] * n)]))) for n in (1000, 2000))
    assert long - short == 4000


def test_news_comes_back():
    update = Update(id="a", token_ids=[3, 4], logprobs=[{3: -0.5}, {4: -1.0}], finish_reason="stop", stop_id=4)
    report = wire.Report(updates=[update], refusals=[wire.Refusal(id="b", message="no", invalid=True)], stats=None)
    assert wire.from_engine.decode(wire.encode(report)) == report


def test_what_is_no_array_is_not_sent_as_one():
    with pytest.raises(TypeError):
        wire.encode(wire.Submit(requests=[object()]))
