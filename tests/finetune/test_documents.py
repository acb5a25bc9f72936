"""Each format gives the same documents; each error names the file, the line and the field."""

import gzip
import json
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora_jax.finetune.documents import sources

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS = [
    {"text": "one"},
    {"prompt": "2 + 2 =", "completion": " 4", "source": None},
    {"messages": CHAT},
]
WANTED = [("text", "one"), ("completion", ("2 + 2 =", " 4")), ("messages", CHAT)]
JSONL = "\n".join(map(json.dumps, RECORDS)) + "\n"


def read(*files):
    return [document for source in sources(files) for document in source]


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", JSONL),
        ("b.jsonl", "\ufeff" + JSONL.replace("\n", "\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.json", json.dumps(RECORDS, indent=1)),
    ],
)
def test_formats_of_records(tmp_path, name, content):
    found = read(write(tmp_path, name, content))
    assert [document[:2] for document in found] == WANTED


@pytest.mark.parametrize("record", range(3))
def test_parquet(tmp_path, record):
    file = tmp_path / "a.parquet"
    extra = [{**RECORDS[record], "id": i} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(extra), file)
    found = read(file)
    assert len(found) == 2500
    assert {str(document[:2]) for document in found} == {str(WANTED[record])}
    assert found[-1].where == f"{file}, row 2500"


def test_plain_texts_and_folders(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    write(folder, "b.py", "x = 1\n")
    write(folder, "a.md", "é\r\n")
    write(folder / "sub", "c", "c")
    write(folder, ".hidden", b"\xff")
    found = read(folder, write(tmp_path, "z.txt", ""))
    assert [document.value for document in found] == ["é\r\n", "x = 1\n", "c", ""]
    assert [document.empty for document in found] == [False, False, False, True]


def test_what_is_empty(tmp_path):
    blank = [{**CHAT[1], "content": "\n"}]
    records = [{"text": " "}, {"prompt": "x", "completion": ""}, {"messages": CHAT + blank}]
    full = [{"text": "."}, {"prompt": "", "completion": "x"}, {"messages": CHAT}]
    found = read(write(tmp_path, "a.json", json.dumps(records + full)))
    assert [document.empty for document in found] == [True] * 3 + [False] * 3


def test_the_digest_is_of_the_content_alone(tmp_path):
    one = read(write(tmp_path, "a.jsonl", JSONL))
    two = read(write(tmp_path, "b.json", json.dumps(RECORDS[::-1])))
    assert [d.digest for d in one] == [d.digest for d in two[::-1]]
    assert len({d.digest for d in one}) == 3


BAD = [
    ('{"text": }', "expected JSON, found expecting value at column 10"),
    ("[" * 100000, "expected JSON of a record, found maximum recursion"),
    ('{"text": ' + "1" * 5000 + "}", "expected JSON of a record, found Exceeds the limit"),
    (
        '["text"]',
        "expected a record with 'text', 'prompt' and 'completion', or 'messages', found a list",
    ),
    ('{"body": "x"}', "or 'messages', found 'body'"),
    ("{}", "or 'messages', found no field"),
    ('{"text": null}', "or 'messages', found null in 'text'"),
    ('{"text": "x", "messages": []}', "found 'text' and 'messages' together"),
    ('{"text": "x", "completion": "y"}', "found 'text' and 'completion' together"),
    ('{"text": ["x"]}', "text must be text, found a list"),
    ('{"text": 3}', "text must be text, found 3"),
    ('{"prompt": "x"}', "completion must be text, found none"),
    ('{"completion": "x"}', "prompt must be text, found none"),
    ('{"prompt": [], "completion": "x"}', "prompt must be text, found a list"),
    ('{"messages": "x"}', "messages must be a list, found text"),
    ('{"messages": []}', "the last of messages must be the assistant's, found none"),
    ('{"messages": ["x"]}', "messages[0]: expected 'role' and 'content', found text"),
    ('{"messages": [{"content": "x"}]}', "messages[0]: role must be text, found none"),
    (
        '{"messages": [{"role": "bot", "content": "x"}]}',
        "messages[0]: role must be one of system, developer, user, assistant, tool, found 'bot'",
    ),
    ('{"messages": [{"role": "user"}]}', "messages[0]: content must be text, found none"),
    (
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        "messages[0]: content must be text, found a list",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "the last of messages must be the assistant's, found the role 'user'",
    ),
    ('{"text": "a\\ud800"}', "text must be Unicode, found half of a surrogate pair at 1"),
    (b'{"text": "\xff"}', "expected UTF-8, found the byte 0xff"),
]


@pytest.mark.parametrize("line, said", BAD)
def test_a_bad_line(tmp_path, line, said):
    line = line if isinstance(line, bytes) else line.encode()
    file = write(tmp_path, "a.jsonl", b'{"text": "x"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 3")) as caught:
        read(file)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", '[{"text": "x"},\n{"text": 1}]', "a.json, record 2: text must be text, found 1"),
        (
            "a.json",
            '{"text": "x"}\n{"text": "y"}',
            "a.json, line 2: expected JSON, found extra data",
        ),
        ("a.json", '{"text": "x"}', "found a record; a file with one record a line must end in"),
        ("a.txt", b"x\ny\n\xfez", "a.txt, line 3: expected UTF-8, found the byte 0xfe"),
        ("a.parquet", "PAR1", "a.parquet cannot be read as Parquet: "),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())[:-4], "a.jsonl.gz is damaged after line"),
        ("b.jsonl.gz", JSONL, "b.jsonl.gz is damaged after line 0: Not a gzipped file"),
    ],
)
def test_a_bad_file(tmp_path, name, content, said):
    file = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=re.escape(said)):
        read(file)


def test_bad_columns_of_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), file)
    with pytest.raises(ValueError, match=r"a.parquet, row 1: .* found 'body', 'id'"):
        read(file)
    pq.write_table(pa.table({"text": ["x", None]}), file)
    with pytest.raises(ValueError, match=r"a.parquet, row 2: .* found null in 'text'"):
        read(file)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no data was given; expected a file, a folder"):
        sources([])
    with pytest.raises(ValueError, match=r"gone\.jsonl is not there; expected a file, a folder or"):
        sources([tmp_path / "gone.jsonl"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder has no file; expected a folder of texts"):
        sources([tmp_path / "folder"])


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list([{"text": "x", "id": 1}, {"text": "y", "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [d.value for d in read("hub:me/data")] == ["x", "y"]
    assert read("hub:me/data:test")[1].where == "hub:me/data:test, row 2"
    assert asked == [("me/data", {"split": "train"}), ("me/data", {"split": "test"})]
    with pytest.raises(ValueError, match="hub:data names no data set; expected hub:owner/name or"):
        read("hub:data")


def test_the_hub_without_a_network(monkeypatch):
    import datasets

    def load(name, split):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = (
        r"could not be loaded \(ConnectionError: Couldn't reach it\); without a network, download"
    )
    with pytest.raises(ValueError, match=said):
        read("hub:me/data")


def test_a_huge_line_takes_linear_time(tmp_path):
    line = json.dumps({"text": "é\n" * 10**7}, ensure_ascii=False)
    file = write(tmp_path, "a.jsonl", line)
    start = time.monotonic()
    assert len(read(file)[0].value) == 2 * 10**7
    assert time.monotonic() - start < 10


def test_no_pickle_is_read(tmp_path):
    file = write(tmp_path, "a.pkl", b"\x80\x04\x95cos\nsystem\n")
    with pytest.raises(ValueError, match="line 1: expected UTF-8, found the byte 0x80"):
        read(file)
