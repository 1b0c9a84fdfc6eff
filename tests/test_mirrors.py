"""Every module has its test file at the same place below tests/; what has none says here where its tests are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# A module, or a folder of them, below smollm3_jax/ or the root -> why it has no test file of its own.
ELSEWHERE = {
    "attention/": "tests/test_attention.py and test_gpu.py call them through `attention` and `decode_attention`",
    "chat/screen.py": "tests/chat/test_terminal.py looks at the screen",
    "chat/slash_commands.py": "tests/chat/test_terminal.py",
    "chat/template_process.py": "tests/chat/test_template.py renders through it",
    "commands/": "tests/commands/test_commands.py and test_main.py run the commands as a user does",
    "config_file.py": "tests/test_config.py reads and writes files",
    "errors.py": "classes alone; whoever raises one has a test of it",
    "file_kind.py": "tests/weights/test_foreign.py",
    "generation/lines.py": "tests/generation/test_jsonl.py asks with files, tests/test_on_ray.py with batches",
    "generation/requests.py": "tests/generation/test_api.py refuses what is refused, and adds up deltas",
    "generation/sequence.py": "tests/generation/test_api.py: stop texts, thinking, what is handed out",
    "generation/stats.py": "tests/generation/test_api.py",
    "kernels/": "tests/kernels/test_product.py calls them through `product`; test_paged_gpu.py the norm",
    "nvidia.py": "asks a driver that is not there",
    "logs.py": "one function; whoever logs calls it",
    "nesting.py": "tests/chat/test_parse.py and generation/test_jsonl.py",
    "plan/report.py": "tests/plan/test_train.py and test_decode.py",
    "plan/scale.py": "tests/plan/test_tables.py",
    "sharding/collectives.py": "tests/sharding/test_roofline.py",
    "sharding/hardware.py": "a table; tests/sharding/test_roofline.py reads it",
    "sharding/products.py": "tests/sharding/test_roofline.py",
    "rms_norm.py": "tests/test_model.py against transformers; attention/test_paged_gpu.py its kernel",
    "serve/contract.py": "types alone",
    "serve/conversation.py": "tests/serve/test_chat.py, as a client writes them",
    "serve/errors.py": "tests/serve/test_job.py",
    "serve/fields.py": "tests/serve/test_job.py, with bodies of all kinds",
    "serve/formats.py": "tests/serve/test_chat.py",
    "serve/items.py": "tests/serve/test_responses.py",
    "serve/params.py": "tests/serve/test_chat.py",
    "serve/samples.py": "tests/serve/test_chat.py and test_completions.py count and list tokens",
    "serve/spoken.py": "tests/serve/test_chat.py",
    "serve/ticket.py": "tests/serve/test_worker.py",
    "serve/tools.py": "tests/serve/test_chat.py",
    "sizes.py": "tests/generation/test_api.py, in the sizes of pieces",
    "tokenizer_files.py": "tests/test_tokenizer.py",
    "train/settings_file.py": "tests/train/test_settings.py",
    "train/options.py": "tests/train/test_step.py",
    "train/run/evaluation.py": "tests/train/run/test_loop.py has held-out text",
    "train/run/program.py": "tests/train/run/test_faults.py, where memory lacks",
    "train/run/setup.py": "tests/train/run/test_frozen.py and test_loop.py set up runs",
    "weights/gguf_header.py": "tests/weights/test_gguf.py",
    "weights/merge_file.py": "tests/weights/test_merge.py, with files of all kinds",
    "weights/gguf_tokenizer.py": "tests/weights/test_gguf.py",
    "weights/summary.py": "tests/commands/test_commands.py, in `inspect`",
    "weights/texts.py": "tests/weights/test_save.py",
    "weights/wheels.py": "tests/evaluate/tasks/test_bfcl.py reads one",
    "weights/torch_files.py": "tests/weights/test_foreign.py",
}


def modules() -> list[str]:
    """Paths below smollm3_jax/, and those of sharding/ with that name."""
    package = [x.relative_to(ROOT / "smollm3_jax") for x in (ROOT / "smollm3_jax").rglob("*.py")]
    beside = [x.relative_to(ROOT) for x in (ROOT / "sharding").glob("*.py")]
    return sorted(x.as_posix() for x in [*package, *beside] if not x.name.startswith("__"))


def test_every_module_has_its_test_file_or_says_where_its_tests_are():
    without = {x for x in modules() if not (ROOT / "tests" / x).with_name(f"test_{Path(x).name}").is_file()}
    said = {x for x in modules() for entry in ELSEWHERE if x == entry or (entry[-1] == "/" and x.startswith(entry))}
    assert not without - said
    # What has its file by now, or is gone, is said of no more.
    assert not [entry for entry in ELSEWHERE if entry[-1] != "/" and entry not in without]
