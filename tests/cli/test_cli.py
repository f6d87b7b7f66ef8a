"""The command line, in this process where that is enough."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fp8_checkpoints as made
import pytest
import released
import tiny_tokenizers
from fp8_checkpoints import quantization_config

import gemcutter.llm
import gemcutter.serve.app
from gemcutter import LLM, EngineConfig, SamplingParams
from gemcutter.checkpoint.files import locate
from gemcutter.cli import COMMANDS, main
from gemcutter.cli.flags import Parser, add_config, add_model, add_sampling, read_config, read_sampling

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
FAST = ["--device", "cpu", "--temperature", "0"]


def fails(capsys, *argv) -> str:
    """The one line on stderr of a command that the user must mend."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("gemcutter") and ": error: " in err
    return err


# Flags


def parsed(*argv):
    parser = Parser(prog="gemcutter")
    add_model(parser)
    add_sampling(parser)
    add_config(parser, "engine", "server")
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def test_no_flags_give_the_default_config():
    assert read_config(parsed()) == EngineConfig()
    assert read_sampling(parsed()) == SamplingParams()


def test_every_field_has_a_flag_of_its_own_type():
    other = {
        "model_path": "x/y", "revision": "main", "device": "cpu", "dtype": "float32", "load_format": "dummy",
        "tensor_parallel_size": 1, "context_length": 99, "mem_fraction_static": 0.5, "max_total_tokens": 64,
        "page_size": 32, "chunked_prefill_size": 128, "max_prefill_tokens": 256, "max_running_requests": 7,
        "cuda_graph_max_bs": 8, "disable_cuda_graph": True, "disable_radix_cache": True, "random_seed": 5,
        "served_model_name": "me", "host": "::1", "port": 1234, "api_key": "k", "max_body_bytes": 10,
        "max_queued_requests": 11, "quantization": "fp8", "kv_cache_dtype": "fp8_e4m3",
    }  # fmt: skip
    missing = {f.name for f in dataclasses.fields(EngineConfig)} - other.keys()
    assert not missing, f"give values for new fields: {missing}"
    argv = []
    for name, value in other.items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    assert read_config(parsed(*argv)) == EngineConfig(**other)


def test_sampling_flags():
    given = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2,
             "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 9}  # fmt: skip
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    params = read_sampling(parsed(*argv, "--stop", "a", "--stop", "b", "--ignore-eos"))
    assert params == SamplingParams(**given, stop=("a", "b"), ignore_eos=True)


def test_the_model_is_positional_or_a_flag():
    assert read_config(parsed("a/b")).model_path == read_config(parsed("--model-path", "a/b")).model_path == "a/b"
    assert read_config(parsed("a/b", "--model-path", "a/b")).model_path == "a/b"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    if command == "serve":
        for field in dataclasses.fields(EngineConfig):
            assert "--" + field.name.replace("_", "-") in out
            if field.default not in (None, False):
                assert re.search(r"\(default: ?" + re.escape(str(field.default)), out)
    elif command is None:
        assert all(name in out for name in COMMANDS)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from gemcutter.cli import main\ntry: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'starlette'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "required: COMMAND"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["generate"], "required: prompt"),
        (["generate", " "], "the prompt is empty"),
        (["generate", "hi", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate", "hi", "--temp", "1"], "unrecognized"),
        (["generate", "hi", "--temperature", "200"], r"temperature must be in \[0.0, 100.0\], got 200"),
        (["generate", "hi", "--stop", ""], "non-empty"),
        (["generate", "hi", "--page-size", "3"], "page_size must be a power of two"),
        (["generate", "hi", "--dtype", "int8"], "--dtype: invalid choice"),
        (["generate", "hi", "--raw", "--chat"], "not allowed with"),
        (["generate", "hi", "--model-path", "/nowhere"], "/nowhere"),
        (["generate", "hi", "--device", "abacus"], "abacus"),
        (["chat", "nowhere"], "no checkpoint 'nowhere'"),
        (["chat", "carat", "--model-path", "carat-edge"], "two checkpoints are named"),
        (["serve", "nowhere"], "no checkpoint 'nowhere'"),
        (["serve", "--port", "70000"], "port must be in"),
        (["serve", "--api-key", ""], "api_key must be a key"),
        (["serve", ""], "name is empty"),
        (["generate", "hi", "--model-path", ""], "name is empty"),
        (["info", "nowhere"], "no checkpoint 'nowhere'"),
        (["info", "--memory", "nan"], "positive number"),
        (["info", "--bandwidth", "0"], "positive number"),
        (["info", "--flops", "many"], "must be a positive number, got many"),
    ],
)
def test_errors_are_one_line(capsys, argv, says):
    assert re.search(says, fails(capsys, *argv))


def test_broken_checkpoints(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    for command in (["info"], ["serve"], ["chat"], ["generate", "hi", "--model-path"]):
        assert "config.json" in fails(capsys, *command, str(tmp_path))


# generate


def test_generate_answers_and_tells_the_time(capsys):
    assert main(["generate", "What is 5 + 4?", *FAST]) == 0
    out, err = capsys.readouterr()
    with LLM(device="cpu") as llm:
        params = SamplingParams(temperature=0)
        [chat] = llm.chat([{"role": "user", "content": "What is 5 + 4?"}], params)
        [raw] = llm.generate("What is 5 + 4?", SamplingParams(temperature=0, max_tokens=7))
    assert out == chat.outputs[0].text + "\n"
    assert re.fullmatch(
        rf"{len(chat.outputs[0].token_ids)} tokens in [\d.]+ s, [\d.]+ tokens/s, first after [\d.]+ s\n", err
    )
    assert main(["generate", "What is 5 + 4?", "--raw", "--max-tokens", "7", *FAST]) == 0
    assert capsys.readouterr().out == raw.outputs[0].text + "\n"


def test_generate_reads_stdin(capsys, monkeypatch):
    assert main(["generate", "What is 5 + 4?", *FAST]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 5 + 4?"))
    assert main(["generate", "-", *FAST]) == 0
    assert capsys.readouterr().out == expected


def test_generate_refuses_what_can_never_run(capsys):
    error = fails(capsys, "generate", "What is 5 + 4? " * 4, "--context-length", "16", *FAST)
    assert "but the context holds 16" in error


def bare(tmp_path, *, tokenizer: bool):
    """carat without its template, and with no tokenizer or one that knows no template."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(locate("carat") / name)
    if tokenizer:
        tiny_tokenizers.byte_fallback(tmp_path)
    return str(tmp_path)


def test_without_template(tmp_path, capsys):
    model = bare(tmp_path, tokenizer=True)
    assert main(["generate", "ab", "--model-path", model, "--max-tokens", "3", *FAST]) == 0
    capsys.readouterr()
    assert "no chat template; use --raw" in fails(capsys, "generate", "ab", "--chat", "--model-path", model, *FAST)
    assert "no chat template" in fails(capsys, "chat", model, *FAST)


def test_without_tokenizer(tmp_path, capsys):
    model = bare(tmp_path, tokenizer=False)
    assert "no tokenizer" in fails(capsys, "generate", "ab", "--model-path", model, *FAST)


def test_ctrl_c_is_clean():
    argv = [sys.executable, "-m", "gemcutter", "generate", "Hello", "--raw", "--ignore-eos", "--device", "cpu"]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(process.stdout.fileno(), 1)  # it speaks
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"\n")


def test_a_reader_that_leaves_is_no_error():
    argv = [sys.executable, "-m", "gemcutter", "generate", "Hello", "--raw", "--ignore-eos", "--device", "cpu"]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


# chat


def converse(monkeypatch, *lines, argv=()) -> list[list[dict]]:
    """Type these lines; gives the conversations that were sent to the model."""
    left, sent = list(lines), []
    stream = LLM.stream

    def spy(self, messages, params):
        sent.append([dict(message) for message in messages])
        return stream(self, messages, params)

    def typed(_):
        if not left:
            raise EOFError
        line = left.pop(0)
        return line() if callable(line) else line

    monkeypatch.setattr(LLM, "stream", spy)
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", *FAST, *argv]) == 0
    assert not left or left == ["never"]
    return sent


def test_chat_keeps_its_history(monkeypatch, capsys):
    lines = ["What is 5 + 4?", "", "Hello", "/what", "/reset", "Hello", "/exit", "never"]
    sent = converse(monkeypatch, *lines, argv=["--system", "Be short."])
    system, five = {"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 5 + 4?"}
    out, err = capsys.readouterr()
    assert sent[0] == [system, five]
    assert sent[1][:2] == [system, five] and sent[1][2]["role"] == "assistant" and sent[1][2]["content"] in out
    assert sent[1][3] == {"role": "user", "content": "Hello"}
    assert sent[2] == [system, {"role": "user", "content": "Hello"}] and len(sent) == 3
    assert "no command /what" in err


def test_chat_over_the_context_goes_on(monkeypatch, capsys):
    argv = ["--context-length", "64", "--max-tokens", "8"]
    sent = converse(monkeypatch, "word " * 100, "Hello", argv=argv)
    assert "but the context holds 64" in capsys.readouterr().err
    assert sent[1] == [{"role": "user", "content": "Hello"}]


def test_ctrl_c_stops_one_answer(monkeypatch, capsys):
    """The signal comes in the middle of a step, and the next answer is as ever."""
    step = gemcutter.llm.Engine.step
    steps = []

    def interrupted(self):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(gemcutter.llm.Engine, "step", interrupted)
    count = []
    lines = ["Hello", lambda: count.append(len(steps)) or "/reset", "What is 5 + 4?", "/reset", "What is 5 + 4?"]
    converse(monkeypatch, *lines, argv=["--ignore-eos", "--max-tokens", "20"])
    monkeypatch.undo()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=20)
    with LLM(device="cpu") as llm:
        first = [delta.text for delta in llm.stream([{"role": "user", "content": "Hello"}], params)]
        [other] = llm.chat([{"role": "user", "content": "What is 5 + 4?"}], params)
    assert count == [3]
    assert capsys.readouterr().out == "".join(first[:3]) + "\n" + 2 * (other.outputs[0].text + "\n") + "\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# serve


def test_serve_gets_the_config(monkeypatch):
    seen = []
    monkeypatch.setattr(gemcutter.serve.app, "serve", lambda config: seen.append(config) or 7)
    assert main(["serve", "carat", "--port", "0", "--page-size", "32"]) == 7
    assert seen == [EngineConfig(model_path="carat", port=0, page_size=32)]


@pytest.mark.parametrize("flags, says", [(["--device", "abacus"], "abacus"), (["--host", "no.invalid"], "no.inv")])
def test_serve_refuses_what_the_user_can_mend(flags, says):
    argv = [sys.executable, "-m", "gemcutter", "serve", "carat", "--port", "0", *flags]
    done = subprocess.run(argv, env=ENV, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and says in done.stderr


def test_serve_for_real():
    argv = [sys.executable, "-m", "gemcutter", "serve", "carat", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, text=True)
    assert re.match(r"gemcutter serves carat at http://127.0.0.1:\d+", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert process.wait(timeout=30) == 0 and time.monotonic() - begin < 30


# info


@pytest.fixture
def folder(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(released.config(name)))
        return str(tmp_path / name)

    return folder


def rows(out: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.strip()]


def test_info_of_the_26b(folder, capsys):
    assert main(["info", folder("26b"), "--memory", "141", "--bandwidth", "4.39", "--flops", "800"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    table = rows(out)
    assert ["25", "sliding", "16", "8", "256", "1024", "own", "2112", "8 of 128 x 704"] in table
    assert ["5", "full", "16", "2", "512", "all", "own, K = V", "2112", "8 of 128 x 704"] in table
    assert ["parameters", "25.23 B, active for a token 3.82 B"] in table
    assert ["weights", "50.47 GB"] in table
    assert "20 KiB a token in full layers" in out and "200 KiB a token in sliding layers, for 1024" in out
    decode = next(row for row in table if row[0] == "32768" and len(row) == 5)
    assert decode[1] == "1.94"
    assert ["1024", "11.2"] in table and ["32768", "348.3"] in table
    each = 32_768 * 20 * 1024 + 1024 * 200 * 1024
    fits = int((141e9 - 2 * 25_233_142_046) // each)
    assert ["32768", "880.80 MB", str(fits), str(fits * 32_768)] in table


def test_info_of_shared_layers(folder, capsys):
    assert main(["info", folder("e2b")]) == 0
    table = rows(capsys.readouterr().out)
    assert ["16", "sliding", "8", "1", "256", "512", "of layer 13", "12288", "-"] in table
    assert ["4", "full", "8", "1", "512", "all", "of layer 14", "12288", "-"] in table


def test_info_of_a_config_in_fp8(folder, capsys):
    path = Path(folder("26b"))
    config = released.config("26b") | {"quantization_config": quantization_config()}
    (path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(path), "--memory", "141", "--bandwidth", "4.39"]) == 0
    table = rows(capsys.readouterr().out)
    assert ["weights", "26.05 GB"] in table
    assert ["stored", "FP8: weights per channel, activations per token"] in table
    held = "qkv (30 layers), o (30 layers), gate_up (30 layers), down (30 layers), experts (30 layers)"
    assert ["in FP8", held] in table and ["saves", "24.42 GB of 50.47 GB"] in table
    fits = int((141e9 - 26_049_920_060) // (32_768 * 20 * 1024 + 1024 * 200 * 1024))
    assert ["32768", "880.80 MB", str(fits), str(fits * 32_768)] in table
    assert next(row for row in table if row[0] == "1024" and len(row) == 5)[1] == "1.10"


def test_info_asks_the_files_where_they_are(tmp_path, capsys):
    """Of experts in bfloat16 the config says nothing; schemes that are dequantised save nothing."""
    made.make(tmp_path / "together", within=None)
    assert main(["info", str(tmp_path / "together")]) == 0
    out = capsys.readouterr().out
    assert "qkv (4 layers), o (4 layers), gate_up (4 layers), down (4 layers)\n" in out and "experts (" not in out
    made.make(tmp_path / "static", config=quantization_config(made.CHANNEL, made.STATIC))
    assert main(["info", str(tmp_path / "static")]) == 0
    out = capsys.readouterr().out
    assert "FP8: weights per channel, activations per tensor, static" in out and "nothing: this scheme" in out
    assert "saves       0 B of" in out and "\n123 linears stored in FP8 are dequantised" in out


def test_quantize(tmp_path, capsys):
    out = tmp_path / "fp8"
    assert main(["quantize", "carat", str(out), "--ignore", "re:.*o_proj"]) == 0
    assert capsys.readouterr().out.startswith(f"Written to {out}: 0.01 GB")
    assert main(["info", str(out)]) == 0
    assert "qkv (6 layers), gate_up (6 layers), down (6 layers), experts (6 layers)" in capsys.readouterr().out
    for arguments, says in (
        (["quantize", "carat", str(out)], "exists"),
        (["quantize", str(out), str(tmp_path / "again")], "is quantised already"),
        (["quantize", "carat", str(tmp_path / "x"), "--ignore", "nothing"], "matches no linear"),
        (["quantize", "carat", str(tmp_path / "x"), "--scheme", "int4"], "fp8-dynamic"),
        (["generate", "hi", "--model-path", str(out), "--quantization", "fp8"], "nothing is left to quantise"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"]


def test_info_says_what_does_not_fit(folder, capsys):
    assert main(["info", folder("31b"), "--memory", "60"]) == 0
    assert "The weights do not fit into 60.00 GB" in capsys.readouterr().out


def test_info_of_the_built_in_model(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith("carat: 6 layers")
