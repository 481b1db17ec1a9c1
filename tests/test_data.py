"""Sources of data: published layouts by the docs' configs, files of every kind, and what is wrong with one."""

import bz2
import gzip
import json
import lzma
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from brought import make_model, make_tokenizer, write_brought

from flows.cli.main import run_command
from flows.runs.inputs import stored_rows
from flows.runs.layouts import Layout
from flows.runs.rows import ParquetRows, held_out, table_of
from flows.runs.run import open_run
from flows.runs.sources import source_files, source_rows
from flows.store.store import Store
from schemas.data import HeldoutConfig, SourceConfig
from schemas.errors import ConfigError
from schemas.tables import Rollouts

DOCS = Path(__file__).parent.parent / "docs/data.md"
TEMPLATE = ("{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
            "{% if add_generation_prompt %}<|bos|>assistant:{% if enable_thinking is defined and not enable_thinking %} no "
            "thought{% endif %}{% endif %}")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- published layouts ---

def documented():
    """Name → config of each layout in the docs."""
    blocks = re.findall(r"```yaml\n# (\S+)\.yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return {name: text for name, text in blocks}


def rows_of_layout(name):
    """Source → rows of that schema, invented."""
    numbers = range(8)
    questions = [f"What is {n} + {n}?" for n in numbers]
    chat = [[user(f"The soup {n}"), assistant("is warm"), user(f"is it {n}?"), assistant("it is")] for n in numbers]
    match name:
        case "gsm8k":
            return {"openai/gsm8k": [{"question": q, "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
                                     for n, q in zip(numbers, questions, strict=True)]}
        case "alpaca":
            return {"alpaca_data.json": [{"instruction": "Name a soup.", "input": "" if n % 2 else f"warm {n}",
                                          "output": "the soup is warm"} for n in numbers]}
        case "sharegpt":
            return {"sharegpt.json": [{"id": f"a_{n}", "conversations": [
                {"from": "human", "value": turns[0]["content"]}, {"from": "gpt", "value": turns[1]["content"]},
                {"from": "human", "value": turns[2]["content"]}, {"from": "gpt", "value": turns[3]["content"]}]}
                for n, turns in zip(numbers, chat, strict=True)]}
        case "ultrachat":
            rows = [{"prompt": f"The soup {n}", "prompt_id": f"{n:x}", "messages": turns}
                    for n, turns in zip(numbers, chat, strict=True)]
            return {"HuggingFaceH4/ultrachat_200k": rows}
        case "ultrafeedback":
            return {"HuggingFaceH4/ultrafeedback_binarized": [{
                "prompt": q, "prompt_id": f"{n:x}", "chosen": [user(q), assistant("it is warm" if n else "same")],
                "rejected": [user(q), assistant("same" if n == 0 else f"cold {n}")],
                "messages": [user(q), assistant("it is warm")], "score_chosen": 8.0, "score_rejected": 4.0 + n}
                for n, q in zip(numbers, questions, strict=True)]}
        case "hh":
            return {"Anthropic/hh-rlhf": [{
                "chosen": f"\n\nHuman: {q}\n\nAssistant: Why?\n\nHuman: say\n\nAssistant: It is {2 * n}",
                "rejected": f"\n\nHuman: {q}\n\nAssistant: Why?\n\nHuman: say\n\nAssistant: no idea"}
                for n, q in zip(numbers, questions, strict=True)]}
        case "helpsteer2":
            return {"nvidia/HelpSteer2": [{"prompt": q, "response": f"{word} {n}", "helpfulness": score, "correctness": 3,
                                           "coherence": 4, "complexity": 1, "verbosity": 1}
                                          for n, q in zip(numbers, questions, strict=True)
                                          for word, score in (("warm", 3), ("cold", 3 if n == 2 else 1))]}
        case "verl":
            rows = [{"data_source": "openai/gsm8k", "prompt": [user(q)], "ability": "math",
                     "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
                     "extra_info": {"split": "train", "index": n}} for n, q in zip(numbers, questions, strict=True)]
            return {"train.parquet": rows, "test.parquet": rows[:3]}
        case "trl-completion":
            return {"trl-lib/Capybara-Completion": [
                {"prompt": turns[:3], "completion": turns[3:]} for turns in chat]}
        case "trl-preference":
            return {"trl-lib/ultrafeedback_binarized": [{
                "chosen": [user(q), assistant("warm")], "rejected": [user(q), assistant(f"cold {n}")], "score_chosen": 8.0,
                "score_rejected": 4.0} for n, q in zip(numbers, questions, strict=True)]}
        case "rlvr":
            return {"allenai/RLVR-GSM": [{
                "messages": [user(q)], "ground_truth": str(2 * n), "dataset": "gsm8k", "constraint_type": None,
                "constraint": None} for n, q in zip(numbers, questions, strict=True)]}
    raise ValueError(name)


def write_source(folder, source, rows, config):
    """A file of its kind; of a data set on the hub the folder of Parquet files that it is there."""
    place = folder / source
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.endswith(".json"):
        place.write_text(json.dumps(rows))
    elif source.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), place)
    else:
        sources = [part for part in config["data"].values() if isinstance(part, dict)]
        splits = {part.get("split", "train") for part in sources}
        subset = next((part["subset"] for part in sources if "subset" in part), "data")
        (place / subset).mkdir(parents=True)
        names = []
        for split in sorted(splits):
            pq.write_table(pa.Table.from_pylist(rows), place / subset / f"{split}-00000-of-00001.parquet")
            names.append(f"  - {{split: {split}, path: '{subset}/{split}-*'}}\n")
        name = "default" if subset == "data" else subset
        (place / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{''.join(names)}---\n")


SMALL = ("base_model.source=model", "iterations=2", "rollout.batch_size=4", "rollout.max_new_tokens=6", "ppo.epochs=1",
         "ppo.minibatches=2", "ppo.learning_rate=1e-3", "data.heldout.rows=2", "execution.threads=1",
         "tracking.enabled=false")


@pytest.mark.parametrize("name", documented())
def test_a_published_layout_trains_by_the_docs_config(tmp_path, name, prefect_server, capsys):
    text = documented()[name]
    assert len(text.strip().splitlines()) <= 10
    folder, config = tmp_path / "case", yaml.safe_load(text)
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    folder.mkdir()
    make_model(tokenizer=tokenizer, max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for source, rows in rows_of_layout(name).items():
        write_source(folder, source, rows, config)
    (folder / "config.yaml").write_text(text)
    small = [setting for setting in SMALL if "heldout" not in setting or "heldout" in config["data"]]
    arguments = [part for setting in small for part in ("--set", setting)]
    code = run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--quiet", *arguments])
    assert code == 0, capsys.readouterr().err
    run = open_run(Store(str(tmp_path / "store")), "case")
    assert run.last().iteration == 2
    _looked_at(name, run)


def _looked_at(name, run):
    """What each of them is about."""
    rows = {role: list(stored_rows(run.store, ref)) for role, ref in run.inputs.items() if role in (
        "prompts", "heldout_prompts", "demonstrations", "pairs", "heldout_pairs")}
    rollouts = run.store.table(run.state(1).artifacts["rollout"], Rollouts)
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    first = tokenizer.decode(rollouts.prompt_tokens[0])
    row = rows["prompts"][int(rollouts.prompt_id[0])]
    match name:
        case "gsm8k" | "verl" | "rlvr":
            assert row["prompt"].startswith("What is") and "messages" not in row
            assert {"answer": 0} | row != {"answer": 0} and first == f"<|bos|>user: {row['prompt']}<|eos|><|bos|>assistant:"
        case "alpaca":
            prompts = {row["prompt"] for row in rows["prompts"]}
            assert prompts == {row["prompt"] for row in rows["demonstrations"]}
            assert not prompts & {row["prompt"] for row in rows["heldout_prompts"]}
            assert all(prompt.startswith("Name a soup.") for prompt in prompts)
            assert rows["demonstrations"][0]["completion"] == "the soup is warm"
        case "sharegpt" | "ultrachat" | "trl-completion":
            learned = rows["demonstrations"][0]
            assert learned["completion"] == "it is"
            assert [m["role"] for m in learned["messages"]] == ["user", "assistant", "user"]
            assert first.startswith("<|bos|>user: The soup ")
            assert ("<|eos|><|bos|>assistant: is warm<|eos|>" in first) == (name != "ultrachat")
        case "ultrafeedback":
            pairs = rows["pairs"] + rows["heldout_pairs"]
            assert len(pairs) == 7 and {pair["chosen"] for pair in pairs} == {"it is warm"}
            assert run.store.manifest(run.inputs["pairs"]).metrics["ties"] == 1
        case "hh":
            pair = rows["pairs"][0]
            assert pair["rejected"] == "no idea" and pair["chosen"].startswith("It is ")
            assert [m["content"] for m in pair["messages"]][1:] == ["Why?", "say"]
            assert first.count("<|bos|>user:") == 2 and first.endswith("<|bos|>assistant:")
        case "helpsteer2":
            pairs = rows["pairs"] + rows["heldout_pairs"]
            assert len(pairs) == 7 and all(pair["chosen"].startswith("warm") for pair in pairs)
        case "trl-preference":
            assert rows["pairs"][0]["chosen"] == "warm" and rows["pairs"][0]["prompt"].startswith("What is")


# --- files ---

ROWS = [{"prompt": "The soup", "answer": 3}, {"prompt": "it is\nwarm, \"so\"", "answer": 4},
        {"prompt": "ça va", "answer": -1}]


def jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_zip(path, data):
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("rows.jsonl", data)


def write_ipc(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def saved(path, rows=ROWS):
    from datasets import Dataset
    Dataset.from_list(rows).save_to_disk(str(path))


def saved_dict(path):
    from datasets import Dataset, DatasetDict
    DatasetDict({"test": Dataset.from_list(ROWS[:1]), "train": Dataset.from_list(ROWS)}).save_to_disk(str(path))


TABLE = pa.Table.from_pylist(ROWS)
KINDS = {
    "p.jsonl": lambda path: path.write_bytes(jsonl()),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl() + b"\n \n"),
    "p.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(jsonl()),
    "p.csv": lambda path: pyarrow.csv.write_csv(TABLE, path),
    "p.tsv": lambda path: pyarrow.csv.write_csv(TABLE, path, pyarrow.csv.WriteOptions(delimiter="\t")),
    "p.parquet": lambda path: pq.write_table(TABLE, path),
    "p.arrow": lambda path: write_ipc(path, TABLE),
    "p.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "p.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl())),
    "p.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "p.zip": lambda path: write_zip(path, jsonl()),
    "saved": saved, "splits": saved_dict,
    "shards": lambda path: (path.mkdir(), pq.write_table(TABLE[:2], path / "train-00000-of-00002.parquet"),
                            pq.write_table(TABLE[2:], path / "train-00001-of-00002.parquet")),
}


def read(folder, source, role="prompts", *, chat=False):
    config = SourceConfig.model_validate(source)
    layout = Layout(role, config, chat)
    return list(table_of(layout.rows(source_rows(role, config, source_files(role, config, folder)))))


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path, name):
    KINDS[name](tmp_path / name)
    expected = [{key: str(value) for key, value in row.items()} for row in ROWS] if name in ("p.csv", "p.tsv") else ROWS
    assert read(tmp_path, name) == expected


def test_imported_rows_are_read_by_need_as_they_were(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": [i, "x"] if i % 2 else {"a": None, "b": i}, "tags": ["a", "b"], "n": i, "f": i / 3}
            for i in range(1200)]
    rows[700]["late"] = True
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    source = SourceConfig(source="p.jsonl")
    table = table_of(Layout("prompts", source, False).rows(source_rows("prompts", source, [tmp_path / "p.jsonl"])))
    table.write(tmp_path / "p.parquet")
    there = ParquetRows(tmp_path / "p.parquet")
    assert list(there) == rows and there[-1] == rows[-1] and there[513] == rows[513] and len(there) == 1200
    assert table.lacks("late").endswith("p.jsonl, line 1") and table.lacks("n") is None
    assert table.only(np.arange(1200) >= 700).lacks("late").endswith("p.jsonl, line 702")
    assert table.only(np.arange(1200) == 700).lacks("late") is None  # those that lack it are gone
    with pytest.raises(IndexError):
        there[1200]


@pytest.mark.parametrize("data, words", [
    (b'{"prompt": "ok"}\n{"prompt": "ok \\ud83d soup"}', r"line 2: column 'prompt': \\ud83d at character 4 is half of a"),
    (b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' is there twice; leave one"),
    ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16; expected UTF-8: iconv"),
    (b"\x1f\x8b\x08", r"cannot be unpacked \(gzip\): .*; is it whole\?"), (b"PAR1\x15\x04", "p.jsonl cannot be read: "),
    (b'{"question": "2 + 2?", "answer": "4"}',
     r"line 1: column 'prompt': expected text, found only 'question', 'answer'; data.prompts.columns: {prompt: question} "),
    (b'{"prompt": [{"role": "user"}]}', "column 'prompt', message 1: content: expected text, found None"),
    (b'{"prompt": [{"content": "x"}]}', "message 1: expected a role, such as user, and a content, found content"),
    (b'{"prompt": [{"role": "system", "content": "x"}]}', "line 1: the conversation has no user's turn; found system"),
    (b'{"prompt": []}', "column 'prompt': expected a list of messages, {role, content} each, found none"),
    (json.dumps({"prompt": [user("a"), assistant("b"), user("c")]}).encode(),
     "is a conversation of 3 turns, .* set base_model.chat_template: true"),
    (b'{"prompt": "' + b"[" * 9, "not JSON: Unterminated string"), (b"[" * 99999, r"p.jsonl: "),
    (b'{"a":' * 99999, "line 1: "), (b'{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: not JSON: Expecting value"),
    (b'[{"prompt": "a"}, 3]', "row 2: expected an object, found 3"), (b"", "is empty"),
    (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}',
     r"line 2: has the id 1, which .*line 1 has too; .*data.prompts.columns: {id: null}")])
def test_what_cannot_be_read_is_named_with_the_way_on(tmp_path, data, words):
    (tmp_path / "p.jsonl").write_bytes(data)
    with pytest.raises(ConfigError, match=words) as error:
        read(tmp_path, "p.jsonl")
    assert "p.jsonl" in str(error.value)


def test_numbers_keep_their_kind_and_columns_that_mean_nothing_here_come_along(tmp_path):
    rows = [{"prompt": "a", "answer": 12, "tags": [1, 2.5], "text": "x", "score": 3}, {"prompt": "b", "answer": 3.5}]
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    found = read(tmp_path, "p.jsonl")
    assert found == rows and [type(row["answer"]) for row in found] == [int, float]
    assert [type(tag) for tag in found[0]["tags"]] == [int, float]


@pytest.mark.parametrize("write, words", [
    (lambda path: zipped(path, {"a.jsonl": "{}", "b.jsonl": "{}"}), "holds 2 files, expected one; unpack it, and name a"),
    (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), r"cannot be unpacked \(zip\)"),
    (lambda path: path.write_text('{"prompt": "a", "note": "\\ud800"}'), "line 1: column 'note': .* half of a surrogate"),
    (lambda path: path.write_text('{"prompt": [{"from": ["x"], "value": "s"}]}'), "expected a role, such as user"),
    (lambda path: path.with_suffix(".csv").write_text("prompt,prompt\na,b\n"), "two columns are called 'prompt'"),
    (lambda path: path.with_suffix(".csv").write_text("prompt,x\na\n"), "line 2 has 1 fields, expected 2"),
])
def test_files_that_would_be_read_otherwise_than_they_are_meant(tmp_path, write, words):
    write(tmp_path / "p.jsonl")
    name = next(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, name)


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in files.items():
            packed.writestr(name, text)


def test_values_of_csv_are_its_texts_and_the_file_in_a_zip_says_what_it_is(tmp_path):
    zipped(tmp_path / "p.zip", {"folder/": "", "folder/a.csv": 'prompt,answer\n"a, ""b""\nc",007\nd,\n'})
    assert read(tmp_path, "p.zip") == [{"prompt": 'a, "b"\nc', "answer": "007"}, {"prompt": "d", "answer": ""}]


@pytest.mark.parametrize("source, words", [
    ("none.jsonl", "data.prompts: no such file: .*none.jsonl"), ("./none", "no such file"),
    ("none.csv.gz", "no such file"), ("org/name-2.5", "is no folder .* and the hub gave"), ("org/name@v1.0", "the hub gave"),
    ("empty", "holds no file of data"), ({"source": "splits", "split": "dev"}, "has no split 'dev'; it has test, train"),
    ({"source": "shards", "split": "dev"}, "cannot be read: .*dev"),
    ({"source": "p.jsonl", "split": "dev"}, "is one file, and has no subset or split"),
    ({"source": "p.jsonl", "columns": {"prompt": "question"}},
     "line 1: has no column 'question', which data.prompts.columns names for 'prompt'; there are prompt, answer"),
    ({"source": "p.jsonl", "columns": {"x": "answer.value"}}, "has no column 'answer.value'"),
    ({"source": "p.jsonl", "columns": {"prompt": ["prompt", "answer"]}}, "column 'answer': expected text to be joined"),
])
def test_a_source_that_is_not_there(tmp_path, source, words):
    for name in ("p.jsonl", "splits", "shards"):
        KINDS[name](tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, source)


# --- columns, conversations, pairs ---

def test_columns_are_mapped_joined_and_left_out(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(jsonl([
        {"q": "a", "more": "b", "info": {"truth": [1, 2]}, "secret": 1}, {"q": "c", "more": "", "info": {"truth": 3}}]))
    source = {"source": "p.jsonl", "columns": {"prompt": ["q", "more"], "answer": "info.truth", "secret": None}}
    assert read(tmp_path, source) == [{"prompt": "a\n\nb", "answer": [1, 2], "info": {"truth": [1, 2]}},
                                      {"prompt": "c", "answer": 3, "info": {"truth": 3}}]


def test_a_system_prompt_is_put_before_those_that_have_none(tmp_path):
    own = [{"role": "system", "content": "mine"}, user("b")]
    (tmp_path / "p.jsonl").write_bytes(jsonl([{"prompt": "a"}, {"prompt": own}]))
    one, other = read(tmp_path, {"source": "p.jsonl", "system": "be kind"}, chat=True)
    assert one == {"prompt": "system: be kind\n\nuser: a", "messages": [{"role": "system", "content": "be kind"}, user("a")]}
    assert other["messages"] == own


def test_tool_messages_are_kept_as_they_are(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}]}
    turns = [user("1 + 1?"), call, {"role": "tool", "name": "add", "content": "2"}]
    (tmp_path / "p.jsonl").write_bytes(jsonl([{"prompt": turns}, {"prompt": "x"}]))
    assert read(tmp_path, "p.jsonl", chat=True)[0]["messages"] == [turns[0], call | {"content": ""}, turns[2]]


def test_a_transcript_without_a_chat_template_stays_text(tmp_path):
    text = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: so?\n\nAssistant:"
    (tmp_path / "p.jsonl").write_bytes(jsonl([{"chosen": f"{text} good", "rejected": f"{text} gone"}]))
    source = {"source": "p.jsonl", "turns": {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}}
    assert read(tmp_path, source, "pairs") == [{"prompt": text, "chosen": " good", "rejected": " gone"}]
    left_out = {"rejected": None}
    assert read(tmp_path, source | {"columns": {"prompt": "chosen"} | left_out}) == [{"prompt": text}]
    assert read(tmp_path, source | {"columns": {"messages": "chosen"} | left_out}, "demonstrations") == [
        {"prompt": text, "completion": " good"}]


@pytest.mark.parametrize("rows, columns, words", [
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, r"1 pairs are ties \(.*line 1\): .* data.pairs.ties: drop"),
    ([{"prompt": "a", "response": word, "score": 1} for word in "bc"], {"score": "score"}, "ties"),
    ([{"prompt": "a", "response": "b"}], {"score": "rating"}, "has no column 'rating'"),
    ([{"prompt": "a", "response": "b", "score": "high"}], {"score": {"score": 1.0}},
     "expected a number as score, found 'high'"),
    ([{"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]}], {}, "expected one assistant's turn"),
    ([{"chosen": [user("a"), assistant("b")], "rejected": [assistant("b")]}], {}, "expected one assistant's turn"),
    ([{"prompt": "a", "chosen": "b"}], {}, "column 'rejected': expected text, found only 'prompt', 'chosen'"),
])
def test_pairs_that_say_nothing_or_cannot_be_read(tmp_path, rows, columns, words):
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, {"source": "p.jsonl", "columns": columns}, "pairs")


def test_every_two_rated_responses_with_other_scores_are_a_pair(tmp_path):
    rows = [{"prompt": "a", "response": r, "help": h, "true": t} for r, h, t in (("x", 1, 0), ("y", 3, 1), ("z", 1, 0))]
    (tmp_path / "p.jsonl").write_bytes(jsonl([*rows, {"prompt": "b", "response": "w", "help": 0, "true": 0}]))
    source = {"source": "p.jsonl", "columns": {"score": {"help": 1.0, "true": 0.5}}, "ties": "drop"}
    pairs = read(tmp_path, source, "pairs")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("y", "x"), ("y", "z")]


# --- held out, too long ---

def test_what_is_held_out_depends_on_the_seed_and_the_texts_alone(tmp_path):
    def cut(rows, seed, count=4):
        (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
        source = SourceConfig(source="p.jsonl")
        table = table_of(Layout("prompts", source, False).rows(source_rows("prompts", source, [tmp_path / "p.jsonl"])))
        rest, held = held_out(table, HeldoutConfig(rows=count, seed=seed), "prompts")
        assert len(rest) + len(held) == len(rows) and not {r["prompt"] for r in rest} & {r["prompt"] for r in held}
        return {row["prompt"] for row in held}

    rows = [{"prompt": f"p{i % 20}"} for i in range(40)]  # each prompt twice
    assert cut(rows, 0) == cut(rows[::-1], 0) != cut(rows, 1) and len(cut(rows, 0)) == 2
    with pytest.raises(ConfigError, match=r"data\.heldout: rows=40 would leave nothing of the 40 rows of data\.prompts"):
        cut(rows, 0, 40)


def brought_with(tmp_path, rows, **data):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    folder = write_brought(tmp_path / "case", make_model(tokenizer=tokenizer, max_position_embeddings=64), tokenizer,
                           prompts=jsonl(rows), base_model={"chat_template": True}, data=data)
    return ["train", str(folder), "--store", str(tmp_path / "store")]


CHAT = [{"role": "system", "content": "be short"}, user("the soup " * 6), assistant("is warm"), user("so it is")]


def test_rows_that_are_too_long_are_refused_dropped_or_cut(tmp_path, capsys, prefect_server):
    rows = [{"prompt": "The soup"}, {"prompt": "warm " * 40 + "is it the end"}, {"prompt": CHAT},
            {"prompt": [user("x " * 200)]}]
    train = brought_with(tmp_path, rows)
    assert run_command(train) == 2
    error = capsys.readouterr().err
    assert "p.jsonl: 3 of 4 rows are too long (line 2, line 3, line 4; the longest has" in error
    assert "data.too_long: drop" in error
    assert not (tmp_path / "store/runs").exists()
    for how, count, words in (("drop", 1, "data.prompts: 3 rows that are too long were dropped, 1 rows are left"),
                              ("cut", 4, "data.prompts: 3 prompts that are too long lost their beginning, 4 rows are left")):
        assert run_command([*train, "--run", how, "--set", f"data.too_long={how}"]) == 0
        assert words in " ".join("".join(capsys.readouterr()).split())
        run = open_run(Store(str(tmp_path / "store")), how)
        there = list(stored_rows(run.store, run.inputs["prompts"]))
        assert len(there) == count
        assert run.store.manifest(run.inputs["prompts"]).metrics == {
            "rows": count, "ties": 0, "too_long": 4 - count, "cut": 3 if how == "cut" else 0}
    assert there[0] == rows[0] and there[1]["prompt"].endswith("is it the end") and len(there[1]["prompt"]) < 200
    assert there[2]["messages"] == [CHAT[0], CHAT[3]] and there[2]["prompt"] == "system: be short\n\nuser: so it is"


@pytest.mark.parametrize("role, words", [
    ("critic", "line 1: the tokenizer's chat template leaves out the critic's"),
    ("robot", "line 1: .* cannot render a conversation .robot, user.: no robots"),
])
def test_roles_that_the_template_does_not_know(tmp_path, capsys, role, words):
    prompts = jsonl([{"prompt": [{"role": role, "content": "x"}, user("a")]}])
    tokenizer = make_tokenizer(chat_template=TEMPLATE.replace("{% for m in messages %}", (
        "{% for m in messages if m['role'] != 'critic' %}{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}"
        "{% endif %}")))
    folder = write_brought(tmp_path / "case", tokenizer=tokenizer, prompts=prompts, base_model={"chat_template": True})
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_arguments_of_the_chat_template_are_part_of_the_prompt(tmp_path, capsys, prefect_server):
    train = brought_with(tmp_path, [{"prompt": "The soup"}] * 8)
    assert run_command([*train, "--set", "base_model.chat_template={enable_thinking: false}"]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    rollouts = run.store.table(run.state(1).artifacts["rollout"], Rollouts)
    assert make_tokenizer().decode(rollouts.prompt_tokens[0]) == "<|bos|>user: The soup<|eos|><|bos|>assistant: no thought"
    assert run_command([*train, "--run", "b", "--set", "base_model.chat_template={enable_thinkin: false}"]) == 2
    assert "base_model.chat_template: the template of model reads no 'enable_thinkin'" in capsys.readouterr().err


def test_an_imported_source_is_found_again_and_named_where_it_changed(tmp_path, capsys, prefect_server):
    train = brought_with(tmp_path, [{"prompt": f"The soup {i}"} for i in range(8)], heldout={"rows": 2},
                                 heldout_prompts=None)
    assert run_command(train) == 0
    (prompts,) = (tmp_path / "store/artifacts/input.prompts").rglob("prompts.parquet")
    content = prompts.read_bytes()
    assert run_command(train) == 0 and prompts.read_bytes() == content
    assert run_command([*train, "--set", "data.heldout.seed=1"]) == 2
    assert "data.heldout_prompts: other content; data.prompts: other content" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "store/artifacts/input.prompts")
    assert run_command(train) == 0
    assert [path.read_bytes() for path in (tmp_path / "store/artifacts/input.prompts").rglob("prompts.parquet")] == [content]


def test_what_is_too_long_depends_on_the_room_for_replies(tmp_path, prefect_server):
    """Another run of the same data in the same store, with turns, imports what fits beside the replies."""
    rows = [{"prompt": "it"}, {"prompt": "zq" * 15}]
    train = brought_with(tmp_path, rows, too_long="drop")
    (tmp_path / "case/rewards.py").write_text(
        "def score(p, r):\n    return [0.0] * len(r)\n\ndef play(messages):\n    return [None] * len(messages)\n")
    turns = ["--set", "rollout={batch_size: 8, max_new_tokens: 8, turns: {function: 'rewards.py:play', max_turns: 2, "
             "max_reply_tokens: 20}}"]
    for name, more, count in (("one", [], 2), ("two", turns, 1)):
        assert run_command([*train, "--run", name, *more]) == 0
        run = open_run(Store(str(tmp_path / "store")), name)
        assert len(stored_rows(run.store, run.inputs["prompts"])) == count


def test_ids_are_of_the_rows_that_are_there_not_of_the_pairs_made_of_them(tmp_path):
    rows = [{"prompt": "a", "response": word, "score": score, "id": score} for score, word in enumerate("xyz")]
    (tmp_path / "p.jsonl").write_bytes(jsonl(rows))
    assert len(read(tmp_path, {"source": "p.jsonl", "columns": {"score": "score"}}, "pairs")) == 3


def test_a_tool_turn_that_a_template_writes_as_json_is_there(tmp_path):
    from flows.language.fitting import Fit
    tokenizer = make_tokenizer(chat_template=TEMPLATE.replace("{{ m['content'] }}", (
        "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] }}{% endif %}")))
    turns = [user("a"), {"role": "tool", "content": '{"x": 1}'}]
    (tmp_path / "p.jsonl").write_bytes(jsonl([{"prompt": turns}]))
    source = SourceConfig(source="p.jsonl")
    table = table_of(Layout("prompts", source, True).rows(source_rows("prompts", source, [tmp_path / "p.jsonl"])))
    assert len(Fit(tokenizer, True, 400, 8).fitted("prompts", table, "refuse")) == 1


def test_a_special_token_where_the_template_changes_a_text_is_named_with_its_row_at_the_start(tmp_path):
    from flows.language.fitting import Fit
    tokenizer = make_tokenizer(chat_template=TEMPLATE.replace("m['content']", "m['content'].replace('secret', '')"))
    tokenizer.split_special_tokens = True
    (tmp_path / "p.jsonl").write_bytes(jsonl([{"prompt": "a"}, {"prompt": "a secret <|eos|>"}]))
    source = SourceConfig(source="p.jsonl")
    table = table_of(Layout("prompts", source, True).rows(source_rows("prompts", source, [tmp_path / "p.jsonl"])))
    with pytest.raises(ConfigError, match=r"p\.jsonl, line 2: a prompt holds a special token"):
        Fit(tokenizer, True, 4000, 8).fitted("prompts", table, "refuse")
