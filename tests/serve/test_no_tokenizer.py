"""A checkpoint without a tokenizer is served on token ids."""

import shutil

import fake_engine
import pytest
from conftest import HERE

CARAT = HERE.parents[1] / "src" / "gemcutter" / "models" / "carat"


@pytest.fixture
def bare(launch, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(CARAT / name, folder)
    return launch(model_path=str(folder), served_model_name="bare")


def test_token_ids_are_the_answer(bare):
    ask = {"prompt": [600, 601], "seed": 5, "max_tokens": 6, "logprobs": 2}
    (choice,) = bare.post("/v1/completions", ask).json()["choices"]
    assert choice["text"] == ""
    assert len(choice["token_ids"]) == 6
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]
    streamed = bare.client().completions.create(model="bare", **ask, stream=True)
    parts = [chunk.choices[0] for chunk in streamed]
    assert [id for part in parts for id in part.token_ids] == choice["token_ids"]
    assert [part.text for part in parts] == [""] * 6

    user = [{"role": "user", "content": "hi"}]
    for path, body in (
        ("/v1/completions", {"prompt": "text"}),
        ("/v1/completions", {"prompt": [600], "stop": ["x"]}),
        ("/v1/chat/completions", {"messages": user}),
        ("/tokenize", {"prompt": "x"}),
        ("/tokenize", {"messages": user}),
        ("/detokenize", {"tokens": [600]}),
    ):
        reply = bare.post(path, body)
        assert reply.status_code == 400, (path, body)
        assert "tokenizer" in reply.json()["error"]["message"]
    assert bare.get("/v1/models").json()["data"][0]["max_model_len"] == fake_engine.CONTEXT
