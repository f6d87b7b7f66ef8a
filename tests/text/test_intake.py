import pytest
import tiny_tokenizers

from gemcutter.params import SamplingParams
from gemcutter.text.intake import Intake
from gemcutter.text.tokens import Tokenizer

EOS = {"eos_token_id": [1, 5, 4]}
VOCAB = 6 + 256 + len(tiny_tokenizers.PIECES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(tiny_tokenizers.byte_fallback(tmp_path_factory.mktemp("gemma")))


@pytest.fixture
def intake(tokenizer):
    return Intake(tokenizer, VOCAB, 32, EOS, random_seed=7)


def test_text_gets_bos_as_the_checkpoint_says(intake, tokenizer):
    [request] = intake.requests("ab", SamplingParams(), "r")
    assert request.prompt_ids.tolist() == [2, *tokenizer.encode("ab", add_special_tokens=False)]
    assert request.id == "r-0"


def test_ids_pass_unchanged(intake):
    given = [7, 8, 9]
    [request] = intake.requests(given, SamplingParams(), "r")
    assert request.prompt_ids.tolist() == given


@pytest.mark.parametrize(
    "prompt, says",
    [
        ([], "empty"),
        ([-1], "-1; token ids are integers"),
        ([3, 10**9], r"1000000000; token ids are integers in \[0, 27"),
        ([3, 2**40], r"1099511627776; token ids are integers in"),
        ([True], "True"),
        ([1.0], "1.0"),
        (["ab"], "'ab'"),
        ([7] * 32, "has 32 tokens, but the context holds 32 .*shorten"),
        ("a " * 40, "but the context holds 32"),
    ],
)
def test_prompts_that_can_never_run(intake, prompt, says):
    with pytest.raises(ValueError, match=says):
        intake.requests(prompt, SamplingParams(), "r")


def test_the_longest_prompt_leaves_one_token(intake):
    [request] = intake.requests([7] * 31, SamplingParams(), "r")
    assert request.params.max_tokens == 1


def test_max_tokens(intake):
    [request] = intake.requests([7] * 12, SamplingParams(), "r")
    assert request.params.max_tokens == 20
    [request] = intake.requests([7] * 12, SamplingParams(max_tokens=20), "r")
    assert request.params.max_tokens == 20
    with pytest.raises(ValueError, match="max_tokens is 21, .* 12 tokens leaves 20 of the context of 32"):
        intake.requests([7] * 12, SamplingParams(max_tokens=21), "r")
    [request] = intake.requests([7] * 12, SamplingParams(max_tokens=21), "r", clip=True)
    assert request.params.max_tokens == 20


def test_stop_ids(intake):
    [request] = intake.requests([7], SamplingParams(stop_token_ids=(9,)), "r")
    assert request.stop_ids == {1, 4, 5, 9}
    [request] = intake.requests([7], SamplingParams(stop_token_ids=(9,), ignore_eos=True), "r")
    assert request.stop_ids == {9}
    for single in (3, None):
        other = Intake(None, 10, 32, {"eos_token_id": single})
        assert other.requests([7], SamplingParams(), "r")[0].stop_ids == ({3} if single else set())


@pytest.mark.parametrize(
    "params", [{"stop_token_ids": (999,)}, {"logit_bias": {999: 1.0}}, {"logit_bias": {-1: 1.0}}]
)
def test_ids_in_params_are_checked(intake, params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} holds"):
        intake.requests([7], SamplingParams(**params), "r")


def test_params_are_resolved(tokenizer):
    defaults = {**EOS, "temperature": 0.7, "top_k": 64, "top_p": 0.95}
    intake = Intake(tokenizer, 280, 32, defaults)
    [request] = intake.requests([7], SamplingParams(top_k=5), "r")
    p = request.params
    assert (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty) == (0.7, 5, 0.95, 0.0, 1.0)


def test_choices_and_seeds(intake):
    first = intake.requests([7], SamplingParams(n=3, seed=-1), "r")
    assert [request.id for request in first] == ["r-0", "r-1", "r-2"]
    assert [request.seed for request in first] == [2**63 - 1, 0, 1]
    assert all(request.params.n == 1 for request in first)
    [largest] = intake.requests([7], SamplingParams(seed=2**64 - 1), "r")
    assert 0 <= largest.seed < 2**63


def test_drawn_seeds_are_repeatable_and_differ(tokenizer):
    def seeds(random_seed):
        intake = Intake(tokenizer, 280, 32, EOS, random_seed)
        return [r.seed for i in range(4) for r in intake.requests([7], SamplingParams(n=4), str(i))]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 16 and all(0 <= seed < 2**63 for seed in seeds(1))


def test_without_a_tokenizer():
    intake = Intake(None, 10, 32, EOS)
    assert intake.requests([7], SamplingParams(), "r")[0].prompt_ids.tolist() == [7]
    with pytest.raises(ValueError, match="no tokenizer"):
        intake.requests("ab", SamplingParams(), "r")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        intake.requests([7], SamplingParams(stop=("x",)), "r")
