from __future__ import annotations

import json

import pytest

from torch_csd.cli.report import UserError, format_bytes
from torch_csd.cli.rows import BrokenRow, OutputRows, Prompt, read_prompts


def test_a_row_without_an_id_is_named_by_its_line(write_prompts):
    path = write_prompts(
        {"prompt": "a"}, "", {"prompt": "b"}, {"id": "c", "messages": [{"role": "user", "content": "x"}]}
    )
    prompts, broken = read_prompts(path)
    assert [prompt.id for prompt in prompts] == [1, 3, "c"]
    assert broken == []


@pytest.mark.parametrize(
    ("line", "row_id", "reason"),
    [
        ('{"prompt": "cut', 2, "not JSON"),
        ("[" * 100_000, 2, "nested too deeply"),
        (r'{"prompt": "half \ud800"}', 2, "not UTF-8: surrogates not allowed"),
        ('"just a text"', 2, "wanted an object"),
        ("{}", 2, 'wanted "prompt" or "messages", got an empty object'),
        ('{"id": "x", "text": "a"}', "x", 'wanted "prompt" or "messages", got "id", "text"'),
        ('{"prompt": "a", "messages": []}', 2, 'wanted "prompt" or "messages"'),
        ('{"id": 7, "prompt": ""}', 7, "not empty"),
        ('{"prompt": 5}', 2, "prompt must be a text"),
        ('{"id": null, "prompt": "a"}', 2, "id must be a number or a text"),
        ('{"messages": ["a"]}', 2, "messages must be a list"),
        ('{"id": 1, "prompt": "a"}', 1, "id 1 is that of line 1 already"),
    ],
)
def test_a_broken_line_is_reported_and_the_others_are_kept(write_prompts, line, row_id, reason):
    prompts, broken = read_prompts(write_prompts({"prompt": "first"}, line, {"prompt": "last"}))
    assert prompts == [Prompt(1, "first"), Prompt(3, "last")]
    assert [row.id for row in broken] == [row_id]
    assert broken[0].error.startswith("line 2: ") and reason in broken[0].error


def test_a_line_that_is_not_utf8_is_a_broken_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    prompts, broken = read_prompts(path)
    assert prompts == [Prompt(1, "a")]
    assert broken == [BrokenRow(2, "line 2: not UTF-8: invalid start byte")]


def test_a_prompts_file_that_is_missing_or_empty_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no rows"):
        read_prompts(tmp_path / "empty.jsonl")


def test_opening_an_output_keeps_finished_rows_only(tmp_path):
    path = tmp_path / "output.jsonl"
    finished = {"id": 1, "prompt": "a", "text": "A"}
    path.write_text(json.dumps(finished) + '\n{"id": 2, "error": "no space"}\n{"id": 3, "prompt": "c", "te')
    with OutputRows(path) as rows:
        assert rows.is_finished(Prompt(1, "a"))
        assert not rows.is_finished(Prompt(2, "b"))
        assert not rows.is_finished(Prompt(3, "c"))
        rows.write({"id": 4, "text": "ä"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [finished, {"id": 4, "text": "ä"}]


def test_a_row_without_its_line_end_is_not_finished(tmp_path):
    path = tmp_path / "output.jsonl"
    path.write_text('{"id": 1, "prompt": "a", "text": "A"}')  # the next row would be glued to it
    with OutputRows(path) as rows:
        assert not rows.is_finished(Prompt(1, "a"))
    assert path.read_text() == ""


def test_an_output_of_other_prompts_is_not_taken_for_ours(tmp_path):
    path = tmp_path / "output.jsonl"
    path.write_text('{"id": 1, "prompt": "a", "text": "A"}\n')
    with OutputRows(path) as rows, pytest.raises(UserError, match="for another prompt; remove it or name another"):
        rows.is_finished(Prompt(1, "b"))


@pytest.mark.parametrize(
    "content", ["do not lose me\n", '{"id": 1, "prompt": "a"}\n', "[1]\n", '{"id": [], "text": ""}\n']
)
def test_an_output_that_is_another_kind_of_file_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(UserError, match="line 1 was not written by this command"):
        OutputRows(path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("byte_count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (210 << 20, "210 MiB"),
        (1288490189, "1.2 GiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_sizes_are_shown_in_units_people_read(byte_count, text):
    assert format_bytes(byte_count) == text
