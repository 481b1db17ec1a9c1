"""Settings on the command line, and users' functions."""

import pytest

from flows.runs.functions import function_files, load_function
from flows.runs.inputs import Rows
from schemas.config import apply_settings
from schemas.errors import ConfigError


def test_settings_are_yaml_and_nest():
    data = apply_settings({"ppo": {"epochs": 4}}, ["ppo.learning_rate=1e-5", "ppo.epochs=2", "evaluate.judge=null",
                                                   "reward.components={a: {source: x}}", "gae.whiten=false"])
    assert data == {"ppo": {"epochs": 2, "learning_rate": 1e-5}, "evaluate": {"judge": None},
                    "reward": {"components": {"a": {"source": "x"}}}, "gae": {"whiten": False}}


@pytest.mark.parametrize("setting", ["a", "=1", "a..b=1", ".a=1"])
def test_a_setting_of_another_form_is_refused(setting):
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_settings({}, [setting])


def test_a_setting_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="seed is a value, not a section"):
        apply_settings({"seed": 1}, ["seed.x=1"])


def test_two_versions_of_a_file_are_two_functions(tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def score(p, r):\n    return [1.0] * len(r)\n")
    one = load_function("f.py:score", [file])
    file.write_text("def score(p, r):\n    return [2.0] * len(r)\n")
    assert (one(["p"], ["r"]), load_function("f.py:score", [file])(["p"], ["r"])) == ([1.0], [2.0])


def test_a_function_of_a_package_is_found_with_its_file(tmp_path):
    source = "statistics:mean"
    assert load_function(source, function_files(source, tmp_path))([1, 3]) == 2


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "f.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match=r"f.py cannot be run: it raised ModuleNotFoundError: No module named "
                                          r"'no_such_package' \(f.py, line 1"):
        load_function("f.py:score", [tmp_path / "f.py"])


@pytest.mark.parametrize("data", [
    b'{"prompt": "a"}\n{"prompt": "b"}', b'{"prompt": "a"}\n{"prompt": "b"}\n\n  \n', 
    b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n', b' {"prompt": "a"} \n\t{"prompt": "b", "more": 1}\n'])
def test_rows_are_those_of_the_lines(tmp_path, data):
    (tmp_path / "p.jsonl").write_bytes(data)
    rows = Rows(tmp_path / "p.jsonl", "prompts")
    assert len(rows) == 2 and [row["prompt"] for row in rows] == ["a", "b"] and rows[1] == {"prompt": "b"}
    with pytest.raises(IndexError):
        rows[2]


def test_line_separators_in_a_text_begin_no_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b\x85"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert [row["prompt"] for row in Rows(tmp_path / "p.jsonl", "prompts")] == ["a\u2028b\x85", "c"]


def test_a_row_that_cannot_be_read_is_named_when_it_is_asked_for(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    rows = Rows(tmp_path / "p.jsonl", "prompts")
    assert rows[0] == {"prompt": "a"}
    with pytest.raises(ConfigError, match=r"p\.jsonl, line 2: column 'prompt': expected text, found 3"):
        rows[1]


@pytest.mark.parametrize("data, words", [
    (b'{"prompt": "ok"}\n{"prompt": "ok \\ud83d soup"}', r"line 2: column 'prompt': \\ud83d at character 4 is half of a"),
    (b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' is there twice; leave one"),
    (b'[\n {"prompt": "a"}\n]', r"is one JSON array; expected JSON lines: jq -c '\.\[\]' .*p.jsonl makes them"),
    (b"PAR1\x15\x04", r"is Parquet; expected JSON lines: datasets.Dataset.from_parquet\('.*'\).to_json\(file\) makes them"),
    ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16; expected UTF-8: iconv"),
    (b"\x1f\x8b\x08", "is compressed; .* gunzip it"),
    (b'{"question": "2 + 2?", "answer": "4"}',
     r"found only 'question', 'answer'; jq -c '{\"prompt\": .\"question\"}' FILE > NEW"),
    (b'{"prompt": [{"role": "user", "content": "x"}]}', r"jq -c '{\"prompt\": .\"prompt\"\[0\].content}' FILE"),
    (b'{"prompt": "' + b"[" * 9, "not JSON: Unterminated string"), (b"[" * 99999, "is one JSON array"),
    (b'{"a":' * 99999, "line 1: "), (b'{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not JSON: Expecting value")])
def test_a_file_that_holds_something_else_says_the_way_on(tmp_path, data, words):
    (tmp_path / "p.jsonl").write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        list(Rows(tmp_path / "p.jsonl", "prompts"))


def test_where_there_is_no_file(tmp_path):
    for path, words in ((tmp_path, "is a folder; name a file of JSON lines in it"),
                        (tmp_path / "a.jsonl", r"no such file: .*a.jsonl$"),
                        (tmp_path / "someone/data", r"datasets.load_dataset\(…\).to_json\(file\) makes one")):
        with pytest.raises(ConfigError, match=words):
            Rows(path, "prompts")


def test_rows_from_the_end_and_in_slices(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(5)))
    rows = Rows(tmp_path / "p.jsonl", "prompts")
    assert rows[-1] == {"prompt": "4"} and [row["prompt"] for row in rows[1:4:2]] == ["1", "3"]
