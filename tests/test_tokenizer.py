"""The released tokenizer against transformers, what is read beside it, and the faults."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.chat.template import render
from smollm3_jax.config import ModelConfig
from smollm3_jax.errors import OptionError, TokenizerError
from smollm3_jax.tokenizer import Tokenizer, _check_vocabulary, load_tokenizer

LANGUAGES = ("en", "fr", "es", "de", "it", "pt")
TINY_SIZE = 256 + 2


def config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        model_type="smollm3",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_layers=(True,),
        eos_token_id=vocab_size - 1,
    )


@pytest.fixture(scope="module")
def released(full_release: Path) -> Tokenizer:
    return load_tokenizer(full_release, ModelConfig.from_hf(full_release))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of the 256 bytes and two special tokens, the first of which opens every text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_encodes_as_transformers(released: Tokenizer, theirs: Any, corpus: Path, language: str):
    lines = (corpus / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    for text in [json.loads(line)["text"] for line in lines[:: len(lines) // 4]]:
        ids = released.encode(text)
        assert len(ids) > 10
        assert ids == theirs.encode(text)
        assert ids == released.encode(text, add_special_tokens=False)
        assert released.decode(ids) == text == theirs.decode(ids)


@pytest.fixture(scope="module")
def theirs(full_release: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(full_release)


@pytest.mark.slow
def test_special_tokens_and_template_are_those_of_transformers(released: Tokenizer, theirs: Any):
    assert released.special_tokens == theirs.special_tokens_map
    assert released.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert released.chat_template == theirs.chat_template
    for text in ("<|im_start|>assistant\n<think>\n</think>\nHi .<|im_end|>", "a <|begin_of_text|> b", " <tool_call>"):
        ids = released.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert released.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_known_ids(released: Tokenizer):
    assert released.encode("<|im_start|>user\nI'm trying") == [128011, 882, 198, 40, 2846, 4560]
    assert released.encode("") == []
    assert released.decode([]) == ""


def test_decoding_skips_control_tokens_but_keeps_thoughts_and_calls(released: Tokenizer):
    text = "<|im_start|>assistant\n<think>\nHm.\n</think>\n<tool_call>x</tool_call><|im_end|>"
    ids = released.encode(text)
    assert [i for i in ids if i >= 128000] == [128011, 128002, 128003, 128015, 128016, 128012]
    assert released.decode(ids) == "assistant\n<think>\nHm.\n</think>\n<tool_call>x</tool_call>"
    assert released.decode(ids, skip_special_tokens=False) == text


SPECIAL = st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|begin_of_text|>", " <tool_call> "])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | SPECIAL).map("".join))
@settings(max_examples=300, deadline=None)
def test_decoding_undoes_encoding(released, text):
    ids = released.encode(text)
    assert released.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < 128256 for i in ids)


@pytest.mark.parametrize("there", [True, False])
def test_other_threads_run_while_a_long_text_is_tokenized(released: Tokenizer, there: bool):
    """C2: a server's event loop is such a thread. The ids of the long text are those of its lines, and decode to it."""
    text = "The quick brown fox, 123 times: é 👋🏽.\n" * 10_000
    ids = released.encode("The quick brown fox, 123 times: é 👋🏽.\n") * 10_000
    found: list[Any] = []
    call = (lambda: released.encode(text)) if there else (lambda: released.decode(ids))
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert found == [ids if there else text] and turns > 10


def test_lone_surrogates_are_refused_by_position(folder: Path):
    with pytest.raises(OptionError, match="surrogate at character 2"):
        load_tokenizer(folder, config(TINY_SIZE)).encode("ab\ud83d")


def test_the_post_processor_adds_its_tokens_on_request(folder: Path):
    tokenizer = load_tokenizer(folder, config(TINY_SIZE))
    plain = tokenizer.encode("hé", add_special_tokens=False)
    assert len(plain) == 3
    assert tokenizer.encode("hé") == [256, *plain]
    assert tokenizer.decode([256, *plain, 257]) == "hé"
    assert tokenizer.decode([256, *plain, 257], skip_special_tokens=False) == "<s>hé</s>"


def test_limits_left_from_training_do_not_cut_texts(folder: Path):
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 257,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    write(folder / "tokenizer.json", raw)
    tokenizer = load_tokenizer(folder, config(TINY_SIZE))
    assert len(tokenizer.encode("ten bytes.")) == 11


@pytest.mark.parametrize(
    ("tokenizer_config", "jinja", "expected"),
    [
        (None, None, None),
        ({}, None, None),
        ({"chat_template": None}, None, None),
        ({"chat_template": "é"}, None, "é"),
        ({"chat_template": "old"}, "new é", "new é"),
        (
            {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            None,
            "d",
        ),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None, None),
    ],
)
def test_the_chat_template_comes_from_either_file(folder: Path, tokenizer_config: Any, jinja: Any, expected: Any):
    if tokenizer_config is not None:
        write(folder / "tokenizer_config.json", tokenizer_config)
    if jinja is not None:
        write(folder / "chat_template.jinja", jinja)
    assert load_tokenizer(folder, config(TINY_SIZE)).chat_template == expected


def test_special_tokens_in_every_spelling(folder: Path):
    assert load_tokenizer(folder, config(TINY_SIZE)).special_tokens == {}
    tokens = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "image_token": "<image>",
    }
    write(folder / "tokenizer_config.json", tokens)
    tokenizer = load_tokenizer(folder, config(TINY_SIZE + 1))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
    assert repr(tokenizer).startswith("Tokenizer(special_tokens={'bos_token': '<s>', 'eos_token': '</s>', ")


# name -> files beside tokenizer.json: what the last bugs of real folders were about, each for one rule of transformers.
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
X, IMG = {"content": "<x>", "lstrip": True}, {"content": "<img>", "special": True}


def added(one: Any, other: Any, *ids: str) -> dict[str, Any]:
    return FAST | {"added_tokens_decoder": dict(zip(ids or ("258", "259"), (one, other), strict=True))}


BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a map alone": {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}},
    "a map over the config": {
        "tokenizer_config.json": FAST | {"eos_token": "<s>"},
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
    "null in the map": {
        "tokenizer_config.json": FAST | {"eos_token": "<s>"},
        "special_tokens_map.json": {"eos_token": None},
    },
    "a map where the config has the added tokens": {
        "tokenizer_config.json": FAST | {"added_tokens_decoder": {"256": {"content": "<s>", "special": True}}},
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
    "extra tokens by name": {
        "tokenizer_config.json": FAST | {"extra_special_tokens": {"image_token": "<img>", "bos_token": "<s>"}}
    },
    "extra tokens by name in the map": {"special_tokens_map.json": {"extra_special_tokens": {"image_token": "<img>"}}},
    "extra tokens in a list": {"tokenizer_config.json": FAST | {"extra_special_tokens": ["<img>", "<x>"]}},
    "additional tokens": {"tokenizer_config.json": FAST | {"additional_special_tokens": ["<img>"]}},
    "extra tokens in both files": {
        "tokenizer_config.json": FAST | {"extra_special_tokens": ["<x>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<img>", "<x>"]},
    },
    "a token that the model names": {"tokenizer_config.json": FAST | {"image_token": "<img>"}},
    "tokens that the model names, as transformers writes them": {
        "tokenizer_config.json": FAST | {"model_specific_special_tokens": {"image_token": "<img>"}}
    },
    "padding that nobody trained": {"tokenizer_config.json": FAST | {"pad_token": "[PAD]"}},
    "added_tokens_decoder": {"tokenizer_config.json": added(X, IMG)},
    "added_tokens_decoder with a gap": {
        "tokenizer_config.json": FAST | {"added_tokens_decoder": {"270": X, "266": IMG}}
    },
    "other flags than tokenizer.json": {
        "tokenizer_config.json": FAST
        | {"added_tokens_decoder": {"257": {"content": "</s>", "special": True, "lstrip": True}}}
    },
    "added_tokens.json": {"added_tokens.json": {"<img>": 259, "<x>": 258}},
    "added_tokens.json and what of it is special": {
        "tokenizer_config.json": FAST | {"pad_token": "<img>"},
        "added_tokens.json": {"<x>": 258, "<img>": 259},
    },
    "added_tokens.json beside added_tokens_decoder": {
        "tokenizer_config.json": FAST | {"added_tokens_decoder": {"258": IMG}},
        "added_tokens.json": {"<x>": 258},
    },
}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("case", BESIDE)
def test_the_files_beside_a_tokenizer_mean_what_they_mean_to_transformers(folder: Path, case: str):
    transformers = pytest.importorskip("transformers")
    for name, content in BESIDE[case].items():
        write(folder / name, content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    mine = load_tokenizer(folder, config(300))
    text = "hi <x> [PAD]<img> </s>"
    assert mine.encode(text) == theirs.encode(text)
    for skip in (False, True):
        assert mine.decode(mine.encode(text), skip) == theirs.decode(theirs.encode(text), skip_special_tokens=skip)
    assert mine.special_tokens == theirs.special_tokens_map
    if "image_token" in mine.special_tokens:  # a name that a template can use
        template = "{{ image_token }}"
        expected = theirs.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
        messages = [{"role": "user", "content": ""}]
        assert render(template, messages, special_tokens=mine.special_tokens) == expected == "<img>"


@pytest.mark.parametrize("token", ["[PAD]", {"content": "[PAD]", "lstrip": True}])
def test_a_token_without_a_row_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture, token: Any):
    write(folder / "tokenizer_config.json", {"pad_token": token})
    tokenizer = load_tokenizer(folder, config(TINY_SIZE))
    assert tokenizer.encode("hello", False) == load_tokenizer(folder).encode("hello", False)
    with pytest.raises(OptionError, match=r"'\[PAD\]', the token 258, which the model has no row for"):
        tokenizer.encode("hello [PAD]", False)
    assert tokenizer.decode([TINY_SIZE], False) == "[PAD]"
    assert "1 added tokens have no row in the model" in caplog.text and "'[PAD]' (258)" in caplog.text


def test_an_added_token_that_cannot_have_its_id_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder / "added_tokens.json", {"<x>": 270})
    assert load_tokenizer(folder, config(300)).encode("<x>", False) == [258]
    assert "get other ids than the file says" in caplog.text and "'<x>' (258)" in caplog.text


BOTH = [{"name": name, "template": name} for name in ("default", "tool_use")]
NO_DEFAULT = [{"name": name, "template": name} for name in ("tool_use", "rag")]
TEMPLATE_FILES: dict[str, dict[str, Any]] = {
    "a list": {"tokenizer_config.json": {"chat_template": BOTH}},
    "an object": {"tokenizer_config.json": {"chat_template": {"default": "default", "tool_use": "tool_use"}}},
    "files": {"chat_template.jinja": "default", "additional_chat_templates/tool_use.jinja": "tool_use"},
    "files over the list": {
        "tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "old"}]},
        "chat_template.jinja": "default",
    },
    "a third": {"chat_template.jinja": "default", "additional_chat_templates/rag.jinja": "rag"},
}


@pytest.mark.parametrize("case", TEMPLATE_FILES)
def test_tools_get_the_template_for_tools(folder: Path, case: str):
    transformers = pytest.importorskip("transformers")
    for name, content in TEMPLATE_FILES[case].items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    mine = load_tokenizer(folder, config(TINY_SIZE))
    for tools in (None, [], [{"name": "f"}]):
        assert mine.template(tools) == theirs.get_chat_template(tools=tools)


def test_templates_without_a_default_are_named(folder: Path):
    write(folder / "tokenizer_config.json", {"chat_template": NO_DEFAULT})
    tokenizer = load_tokenizer(folder, config(TINY_SIZE))
    assert tokenizer.template([]) == "tool_use"
    with pytest.raises(TokenizerError, match="chat templates rag, tool_use, but none named default"):
        tokenizer.template()


@pytest.mark.slow
def test_a_panic_of_the_library_is_a_typed_error(released: Tokenizer):
    """A run of spaces is more than the released tokenizer's regular expression can take (a BaseException)."""
    with pytest.raises(TokenizerError, match=r"cannot encode a text of 12,000,000 characters"):
        released.encode(" " * 12_000_000)
    assert released.encode("Hi") == [13347]


def test_a_word_that_the_vocabulary_lacks_is_a_typed_error():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(TokenizerError, match="cannot encode a text of 1 characters"):
        Tokenizer(backend, None, {}).encode("b")


@pytest.mark.parametrize("length", [100_000_001, 512 * 5 + 1])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(folder: Path, length: int):
    tokenizer = load_tokenizer(folder, config(TINY_SIZE))
    assert len(tokenizer.encode("a" * 512 * 4, context=512)) == 2049  # perhaps too long, which the ids then show
    with pytest.raises(OptionError, match=rf"{length:,} characters, which is more than 512 tokens can hold"):
        tokenizer.encode("a" * length, context=512)


def strip_decoder() -> Tokenizer:
    """As Llama 2's: a space begins every word, and the decoder takes away the one that begins a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    words = ["▁the", "▁cat", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="▁the"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, None, {})


BYTES = [2 + byte for byte in "🐈".encode()]


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        ([0], [1, 1, 1], " cat cat cat"),
        ([], [1, 1], "cat cat"),
        ([258], [1], "cat"),
        ([0] + 40 * [258], [1], " cat"),
        ([0, *BYTES], BYTES, "🐈"),
        ([0, *BYTES * 9], [*BYTES, 1], "🐈 cat"),
        ([0, *BYTES[:2]], BYTES[2:], "🐈"),
        ([0], BYTES[:3], "\ufffd\ufffd\ufffd"),
    ],
)
def test_new_tokens_are_decoded_after_their_prompt(prompt: list[int], new: list[int], text: str):
    step = strip_decoder().decode_stream(prompt=prompt)
    assert "".join(step(token) for token in [*new, None]) == text


def test_a_missing_tokenizer_says_what_to_copy(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing; .* copy tokenizer\.json from the model's"):
        load_tokenizer(tmp_path, config(TINY_SIZE))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_garbled_tokenizer_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, config(TINY_SIZE))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_tokenizer_is_named(folder: Path, share: float):
    path = folder / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(folder, config(TINY_SIZE))


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, config(TINY_SIZE))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 3}]}'),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", b'{"extra_special_tokens": ["\\ud800"]}'),
        ("tokenizer_config.json", b'{"model_specific_special_tokens": {"image_token": "\\ud800"}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"300": {"content": "\\ud800"}}}'),
        ("special_tokens_map.json", b'{"bos_token": {"content": "\\udfff"}}'),
        ("added_tokens.json", b'{"\\ud800": 300}'),
    ],
)
def test_garbled_files_beside_the_tokenizer_are_named(folder: Path, name: str, content: bytes):
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        load_tokenizer(folder, config(TINY_SIZE))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_pointer_is_no_template(folder: Path, name: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000\n")
    with pytest.raises(TokenizerError, match=rf"{name} is no chat template: it is a git-LFS pointer .* 5,000 bytes"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_that_leads_nowhere_is_named(folder: Path, name: str):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0")
    with pytest.raises(TokenizerError, match=f"{name} cannot be read as .*: it is a link that leads nowhere"):
        load_tokenizer(folder)


@pytest.mark.parametrize("rows", [TINY_SIZE, 320, 512, 2 * TINY_SIZE])
def test_a_padded_vocabulary_belongs_to_the_tokenizer(folder: Path, rows: int):
    assert load_tokenizer(folder, config(rows)).decode([rows - 1]) in ("", "</s>")


@pytest.mark.parametrize("rows", [1, 255, 2 * TINY_SIZE + 1, 49152, 128256])
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(folder: Path, rows: int):
    with pytest.raises(TokenizerError, match=rf"largest token id is {TINY_SIZE - 1}, but vocab_size .* is {rows};"):
        load_tokenizer(folder, config(rows))


@pytest.mark.parametrize("rows", [128256, 128256 + 1023])
def test_the_released_tokenizer_fits_its_vocabulary_and_paddings_of_it(released: Tokenizer, rows: int):
    _check_vocabulary(Path("tokenizer.json"), released.backend, config(rows))


@pytest.mark.parametrize("rows", [127999, 128256 + 1024])
def test_the_released_tokenizer_fits_no_other_vocabulary(released: Tokenizer, rows: int):
    with pytest.raises(TokenizerError, match=f"largest token id is 128255, but vocab_size .* is {rows};"):
        _check_vocabulary(Path("tokenizer.json"), released.backend, config(rows))


@pytest.mark.slow
def test_importing_loads_neither_tokenizers_nor_jinja2():
    modules = "smollm3_jax.tokenizer, smollm3_jax.chat.template"
    code = f"import sys, {modules}; assert not {{'tokenizers', 'jinja2'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_a_panic_of_the_library_is_an_error():
    """A regular expression that gives up, as SmolLM3's does on millions of spaces; Python sees no Exception."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    with pytest.raises(TokenizerError, match="cannot encode a text of 41 characters: Onig"):
        Tokenizer(backend, None, {}).encode("a" * 40 + "b")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"added_tokens": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": {"type": "BPE", "vocab": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}}",
    ],
)
def test_a_deep_tokenizer_is_refused(folder: Path, content: bytes):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        load_tokenizer(folder, config(TINY_SIZE))


def test_a_huge_tokenizer_and_an_endless_one_are_refused_unread(folder: Path):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=r"1,099,511,627,776 bytes; at most 268,435,456 are read"):
        load_tokenizer(folder, config(TINY_SIZE))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match="no regular file"):
        load_tokenizer(folder, config(TINY_SIZE))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": [5]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"258": "x"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
        ("special_tokens_map.json", {"eos_token": 5}),
        ("special_tokens_map.json", [1]),
        ("added_tokens.json", {"x": "y"}),
        ("added_tokens.json", {"x": -1}),
        ("added_tokens.json", "[" * 10_000),
    ],
)
def test_tokens_in_no_known_form_are_named(folder: Path, name: str, content: Any):
    write(folder / name, content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        load_tokenizer(folder, config(300))


def test_the_bytes_of_tokens(full_release):
    tokenizer = load_tokenizer(full_release)
    text = "Hé 👋🏽 naïve\n\t<think>日本<|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert {tokenizer.token_bytes(i)[0] for i in range(len(tokenizer.backend.get_vocab()))} >= {0, 32, 0x80, 0xF0}
    special = [tokenizer.is_special(tokenizer.encode(text)[0]) for text in ("<|im_end|>", "<think>", "a")]
    assert special == [True, False, False]
    assert tokenizer.token_bytes(10**6) == b""


def test_the_bytes_of_tokens_that_spell_bytes_out():
    vocabulary = {"<unk>": 0, "\u2581Hi": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}
    model = tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(tokenizers.Tokenizer(model), None, {})
    assert [tokenizer.token_bytes(i) for i in (1, 2, 3, 4)] == [b" Hi", b"\xe2", b"\x82", b"\xac"]
