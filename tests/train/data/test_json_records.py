"""Where records lie in files of JSON."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from smollm3_jax.train.data import json_records
from smollm3_jax.train.data.json_records import spans

RECORDS = [{"text": "one]"}, {"text": "zwei, {", "deep": {"n": [1, {}]}}, {"text": "三"}]


def records(tmp_path, content, several_lines=True):
    """What lies in the spans; None where that is no JSON."""
    file = epath.Path(tmp_path) / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = spans(file, several_lines)
    whole, out = file.read_bytes(), []
    for start, end in (found[i] for i in range(len(found))):
        try:
            out.append(json.loads(whole[start:end].decode()))
        except (ValueError, RecursionError):
            out.append(None)
    return out


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\n\r\n \t\n\n"),
        LINES.rstrip("\n"),
        b"\xef\xbb\xbf" + LINES.encode(),
        b"\xef\xbb\xbf\r\n" + LINES.encode(),
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "\n [" + ",\n".join(map(json.dumps, RECORDS)) + "\n,]\n",
        "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    ],
)
def test_lines_arrays_and_values(tmp_path, content):
    assert records(tmp_path, content) == RECORDS


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (json.dumps(RECORDS)[:-1], [*RECORDS, None]),
        (json.dumps(RECORDS)[:-5], [*RECORDS[:2], None]),
        (json.dumps(RECORDS) + " more", [*RECORDS, None]),
        ('[{"n": ' + "9" * 5000 + "}, {}]", [None, {}]),
        ("[" * 100_000, [None]),
        ("[]", []),
        ("", []),
        ("\r\n \n", []),
        ('{"cut\n' + LINES, [None, *RECORDS]),
        (LINES + '{"cut', [*RECORDS, None]),
    ],
)
def test_damage_is_a_record_that_cannot_be_read(tmp_path, content, wanted):
    assert records(tmp_path, content) == wanted


def test_arrays_are_lines_where_lines_are_meant(tmp_path):
    assert records(tmp_path, "[1]\n[2]\n", several_lines=False) == [[1], [2]]


@given(st.lists(st.sampled_from([b"", b"\r", b" ", b"\t \r", b"{}", b' {"a": 1}', b"[1, 2]", b'"xyz"\r']), max_size=30))
def test_lines_wherever_blocks_end(tmp_path_factory, lines):
    folder, block = tmp_path_factory.mktemp("lines"), json_records._BLOCK
    for json_records._BLOCK in (1, 3, 5, block):
        found = records(folder, b"\n".join(lines), several_lines=False)
        assert found == [json.loads(line) for line in lines if line.strip()]
