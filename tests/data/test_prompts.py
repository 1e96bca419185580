"""Prompts from lists, text files and tables."""

import json

import pytest
import torch
from tiny_pipelines import PROMPTS, TEXT_LENGTH, tiny_pipeline

from hybriddit.data.prompts import read_prompts
from hybriddit.data.teacher_images import teacher_images


def test_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a shoe\n\n  a bag \n", encoding="utf-8")
    assert read_prompts(path) == read_prompts(str(path)) == ["a shoe", "a bag"]
    assert read_prompts(["a shoe", " "]) == ["a shoe"]
    with pytest.raises(FileNotFoundError, match="one prompt a line"):
        read_prompts(str(tmp_path / "none.txt"))
    path.write_text("\n")
    with pytest.raises(ValueError, match="prompts.txt holds no prompt"):
        read_prompts(path)


def test_lines_end_at_newlines_alone(tmp_path):
    """A byte order mark is dropped; what else Unicode calls a line's end is part of the prompt."""
    path = tmp_path / "prompts"
    kept = ["a red\u2028shoe", "a\x85bag", "a\x0cboot\x0c", "a\x1ccoat\u2029"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join((*kept[:2], "", "\n".join(kept[2:]))).encode())
    assert read_prompts(path) == kept


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252", "shift-jis"])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.csv"])
def test_other_encodings_are_refused(encoding, name, tmp_path):
    text = {"cp1252": "café", "shift-jis": "赤い靴"}.get(encoding, "a shoe")
    (tmp_path / name).write_bytes(f"text\n{text}\n".encode(encoding))
    with pytest.raises(ValueError, match=f"{name} is no UTF-8 text") as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


TABLES = {
    "a.jsonl": '{"prompt": "a shoe", "seed": 3}\n\n{"Text": "a bag"}\r\n"a boot\u2028on a mat"\n\n',
    "b.json": '["a shoe", {"caption": "a bag"}, {"prompt": "a boot\\u2028on a mat", "text": "no"}]',
    "c.csv": '\ufeffid,Prompt\n1,a shoe\n2,"a bag"\n3,\n3\n\n4,a boot\u2028on a mat',
    "d.TSV": "Prompt\tCategory\na shoe\tthings\na bag\na boot\u2028on a mat\tthings\n",  # as PartiPrompts
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_parsed(name, tmp_path):
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a shoe", "a bag", "a boot\u2028on a mat"]


NOTHING = {
    "a.jsonl": '{"prompt": "a shoe"}\n{"prompt": null}\n{"text": NaN, "prompt": ""}\n{"prompt": null, "text": "a bag"}\nnull',
    "b.json": '["a shoe", null, NaN, " ", {"prompt": " ", "caption": "a bag"}]',
    "c.csv": "\n\nprompt,text\n\na shoe,no\nNone,\n,nan\nNA,null\n,a bag\n",  # as pandas writes what is not there
}


@pytest.mark.parametrize("name", NOTHING)
def test_rows_without_a_prompt_are_left_out_and_counted(name, tmp_path, capsys):
    (tmp_path / name).write_text(NOTHING[name])
    assert read_prompts(tmp_path / name) == ["a shoe", "a bag"] and not capsys.readouterr().out
    read_prompts(tmp_path / name, says=True)
    assert capsys.readouterr().out == f"3 of 5 rows in {tmp_path / name} have no prompt: they are left out\n"


def test_a_quoted_prompt_of_a_table_keeps_its_commas_and_lines(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"a shoe, ""red""\non a mat"\na bag\n')
    assert read_prompts(tmp_path / "a.csv") == ['a shoe, "red"\non a mat', "a bag"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"a shoe"\n\n{"prompt": "a', r"a.jsonl, line 3: no JSON"),
        ("a.jsonl", '{"prompt": null}', r"a.jsonl holds no prompt"),
        ("a.jsonl", '{"prompt": ["a", "b"]}', r'line 1: a prompt must be text, not \["a", "b"\]'),
        ("a.jsonl", '{"words": "a"}', r"line 1: it has no prompt or text or caption, only words"),
        ("a.jsonl", r'"half: \ud83d"', r"line 1: a prompt holds half of a character"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl, line 1: no JSON"),
        ("a.json", '{"prompt": "a shoe"}', r"a.json holds no list"),
        ("a.json", '["a", 3]', r"a.json, entry 2: a prompt must be text, not 3"),
        ("a.csv", "prompt\na shoe, red\n", r"a.csv, line 2: it has more columns than the first line, prompt"),
        ("a.csv", "words\na shoe\n", r"a.csv, line 2: it has no prompt or text or caption, only words"),
        ("a.csv", 'prompt\n"a shoe\na bag\n', r"a.csv, line 2: unexpected end of data"),
        ("a.csv", 'prompt\n"[""a shoe"", ""a bag""]"\n', r'line 2: a prompt must be text, not \["a shoe", "a bag"\]'),
        ("a.tsv", "prompt\n['a shoe']\n", r'line 2: a prompt must be text, not \["a shoe"\]'),
        ("a.csv", "Prompt,seed,prompt\na,1,b\n", r"a.csv, line 1: it has two columns named prompt"),
        ("a.jsonl", '{"Text": "a", "text": "b"}', r"a.jsonl, line 1: it has two columns named text"),
        ("a.csv", "", r"a.csv holds no prompt"),
        ("a.parquet", "", r"a.parquet: prompts are read from files ending in .txt, .jsonl, .json, .csv, .tsv"),
    ],
)
def test_what_is_no_prompt_is_told_in_a_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, ["a shoe"], {"prompt": "a shoe"}])
def test_a_list_of_something_else_is_told_too(prompt):
    with pytest.raises(ValueError, match=r"data.prompts: prompt 2 must be text, not"):
        read_prompts(["a shoe", prompt])


def test_the_teacher_takes_a_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PROMPTS))
    pipeline = tiny_pipeline("sd3")
    size = {"height": 64, "width": 64, "steps": 1, "guidance_scale": 1.0, "max_sequence_length": TEXT_LENGTH}
    listed, read = (
        teacher_images(pipeline, prompts, images=2, progress=False, **size)
        for prompts in (PROMPTS, str(tmp_path / "a.json"))
    )
    for name, values in listed.rows([0, 1]).items():
        assert torch.equal(values, read.rows([0, 1])[name])
