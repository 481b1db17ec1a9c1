"""Tables: round trips, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import TableError
from schemas.tables import TABLES, Advantages, Ragged, ReferenceLogprobs, Rewards, Rollouts, require_aligned


def ragged(*rows, dtype=np.float32):
    return Ragged.from_rows([np.array(row) for row in rows], dtype)


def make_rollouts():
    return Rollouts(
        row_id=np.arange(2), prompt_id=np.array([4, 1]), prompt=("a", "é"), response=("b", ""),
        prompt_tokens=ragged([1], [2, 3], dtype=np.int32), response_tokens=ragged([7, 8, 9], [5], dtype=np.int32),
        logprobs=ragged([-0.5, -1.25, -2], [-3]), finish_reason=("eos", "length"))


def test_ragged_rows_lengths_and_sums():
    rows = ragged([1, 2, 3], [], [4])
    assert rows.lengths.tolist() == [3, 0, 1]
    assert rows.sums().tolist() == [6, 0, 4]
    assert rows.row_of_value.tolist() == [0, 0, 0, 2]
    assert [row.tolist() for row in rows] == [[1, 2, 3], [], [4]]


def test_a_table_survives_parquet_bit_for_bit(tmp_path):
    table = make_rollouts()
    pq.write_table(table.to_arrow(), tmp_path / "t.parquet")
    again = Rollouts.from_arrow(pq.read_table(tmp_path / "t.parquet"))
    assert again.response_tokens.values.tolist() == [7, 8, 9, 5]
    assert again.logprobs.values.tobytes() == table.logprobs.values.tobytes()
    assert again.prompt == ("a", "é") and again.finish_reason == ("eos", "length")


def test_named_components_survive_parquet(tmp_path):
    table = Rewards(row_id=np.arange(3), raw_score=np.float32([1, 2, 3]), score=np.float32([1, 2, 3]),
                    components={"length": np.float32([0, -1, -2]), "a": np.float32([7, 8, 9])})
    pq.write_table(table.to_arrow(), tmp_path / "t.parquet")
    again = Rewards.from_arrow(pq.read_table(tmp_path / "t.parquet"))
    assert {name: column.tolist() for name, column in again.components.items()} == {"a": [7, 8, 9], "length": [0, -1, -2]}


def test_every_column_says_what_it_holds():
    for table in TABLES.values():
        for field in table.schema():
            assert len(field.metadata[b"doc"]) > 10, (table, field.name)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.drop_columns(["logprobs"]), "columns: expected"),
    (lambda t: t.set_column(0, "row_id", t["row_id"].cast(pa.int32())), "column 'row_id': expected int64, found int32"),
    (lambda t: t.set_column(3, "response", pa.array(["x", None])), "column 'response': 1 nulls"),
    (lambda t: t.set_column(6, "logprobs", pa.array([[0.0], [0.0]], t.schema.field("logprobs").type)),
     "column 'logprobs', row 0: 1 values, but 'response_tokens' has 3"),
])
def test_a_wrong_table_is_refused_by_column(change, message):
    with pytest.raises(TableError) as error:
        Rollouts.from_arrow(change(make_rollouts().to_arrow()))
    assert message in str(error.value)


def test_tables_that_do_not_line_up_are_refused():
    rollouts = make_rollouts()
    short = ReferenceLogprobs(row_id=np.arange(2), logprobs=ragged([0, 0], [0]))
    with pytest.raises(TableError, match=r"'ReferenceLogprobs.logprobs', row 0: 2 values, but 'Rollouts.logprobs' has 3"):
        require_aligned(rollouts, short)
    other = ReferenceLogprobs(row_id=np.array([0, 2]), logprobs=ragged([0, 0, 0], [0]))
    with pytest.raises(TableError, match=r"row_id does not match the rollouts: expected 2 rows \(0…1\), found 2 \(0…2\)"):
        require_aligned(rollouts, other)


def test_columns_of_one_letter_have_one_length():
    with pytest.raises(TableError, match="column 'returns', row 1"):
        Advantages(row_id=np.arange(2), kl=ragged([1], [1]), rewards=ragged([1], [1]), raw_advantages=ragged([1], [1]),
                   advantages=ragged([1], [1]), returns=ragged([1], [1, 2]))


def test_no_stage_can_change_a_table_that_another_reads(tmp_path):
    """In memory as it was written, or read from a file."""
    table = Rewards(row_id=np.arange(2), raw_score=np.zeros(2, np.float32), score=np.zeros(2, np.float32),
                    components={"a": np.ones(2, np.float32)})
    pq.write_table(table.to_arrow(), tmp_path / "t.parquet")
    for one in (table, Rewards.from_arrow(pq.read_table(tmp_path / "t.parquet"))):
        for column in (one.row_id, one.raw_score, one.score, one.components["a"]):
            with pytest.raises(ValueError, match="read-only"):
                column[0] = 7
    for column in (make_rollouts().logprobs.values, make_rollouts().logprobs.offsets, make_rollouts().prompt_id):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 7
