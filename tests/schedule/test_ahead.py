"""Steps planned before the last one's tokens are read: any order of arrivals, aborts and broken steps."""

from hypothesis import given, settings
from hypothesis import strategies as st
from world import STOP, World, expected, request

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("abort"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["step", "step", "step", "step", "broken"])),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    actions=ACTIONS, ahead=st.booleans(), running=st.integers(1, 4), spare=st.sampled_from([0, 2, 30]),
    page_size=st.sampled_from([1, 4]), chunk=st.sampled_from([1, 5, 16]),
)  # fmt: skip
def test_each_gets_its_own_beginning_whatever_happens(actions, ahead, running, spare, page_size, chunk):
    """World checks pages and their content after every launch and every commit."""
    world = World(page_size=page_size, running=running, chunk=chunk, step=20, spare=spare, ahead=ahead)
    items, aborted = {}, set()
    for name, *numbers in actions:
        if name == "add":
            length, allowed, stops = numbers
            id = str(len(items))
            items[id] = request(id, [length % 3] * length, allowed, stop_ids=(STOP,) if stops else ())
            world.add(items[id])
        elif name == "abort" and str(numbers[0]) in items:
            id = str(numbers[0])
            if world.scheduler.abort(id):
                aborted.add(id)
            world.scheduler.check_invariants()
        elif name in ("step", "broken"):
            world.step(broken=name == "broken")
    world.run()
    for id, item in items.items():
        tokens, reason = expected(item, world.context)
        got = world.outputs[id]
        assert got == tokens[: len(got)]
        if id in aborted:
            assert id not in world.finished and len(got) < len(tokens)
        elif world.finished[id] != "error":
            assert (got, world.finished[id]) == (tokens, reason)
        else:
            assert len(got) < len(tokens) and any(action[0] == "broken" for action in actions)


def test_a_step_that_breaks_while_read_ends_both():
    """Of two steps under way, the second still has the requests of the first."""
    world = World(running=2, ahead=True)
    for id in "abc":
        world.add(request(id, [1, 2, 3], 9, stop_ids=()))
    world.step()
    first, world.before = world.before[0], None
    second = world.scheduler.plan()
    world._launch(second)
    assert [sequence.id for sequence in world.scheduler.fail(first)] == ["a", "b"]
    assert world.scheduler.fail(second) == []
    world.run()
    assert world.finished.keys() == {"c"} and len(world.outputs["c"]) == 9
