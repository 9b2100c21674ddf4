import json
import logging
import os

import pytest

from fake_run import record
from icrouting.evaluation import records


def test_what_is_appended_is_read_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    first, second = [record(0), record(1)], [record(0, method="zero-shot"), record(0, seed=7)]
    records.append(path, first)
    records.append(path, second)
    assert records.read(path) == first + second
    assert len(path.read_text().splitlines()) == 4


def test_a_file_that_is_not_there_yet_reads_as_no_records(tmp_path):
    assert records.read(tmp_path / "none.jsonl") == []


def test_each_append_syncs_once(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    records.append(tmp_path / "records.jsonl", [record(index) for index in range(5)])
    assert len(synced) == 1


def test_a_run_cut_at_any_byte_of_its_last_line_goes_on(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    kept, last = [record(0), record(1)], record(2)
    records.append(path, kept)
    start = path.stat().st_size
    records.append(path, [last])
    whole = path.read_bytes()
    caplog.set_level(logging.INFO)
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        assert records.read(path) == kept
        assert bool(caplog.records) == (size > start)
        records.append(path, [last])
        assert path.read_bytes() == whole


def test_an_append_of_nothing_removes_a_cut_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"method": "ic')
    records.append(path, [])
    assert path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, [record(0)])
    with open(path, "a") as file:
        file.write('{"method": "icr"\n')
    records.append(path, [record(1)])
    with pytest.raises(ValueError, match=r"records\.jsonl:2: Invalid JSON"):
        records.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra: Unexpected .*, got 1"),
        ({"index": "3"}, "index: .* should be a valid integer, got '3'"),
        ({"seed": True}, "seed: .* should be a valid integer, got True"),
        ({"label": 2}, "label must be in 0..1, got 2"),
        ({"prediction": -1}, "prediction must be in 0..1, got -1"),
        ({"option_logits": ["x", 1.0]}, "option_logits.0: .* should be a valid number, got 'x'"),
        ({"option_logits": 3}, "option_logits: .* should be a valid array, got 3"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, change, message):
    path = tmp_path / "records.jsonl"
    records.append(path, [record(0)])
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, **change}) + "\n")
    with pytest.raises(ValueError, match=f"records.jsonl:1: .*{message}"):
        records.read(path)


def test_a_missing_field_and_a_line_that_is_a_list_are_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"method": "icr"}\n')
    with pytest.raises(ValueError, match="task: Field required"):
        records.read(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"should be an object, got \[1, 2\]"):
        records.read(path)


def test_of_records_with_one_key_the_first_counts(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    caplog.set_level(logging.INFO)
    first, again = record(0), record(0, is_right=False)
    records.append(path, [first, record(1), again])
    assert records.read(path) == [first, record(1)]
    assert "1 repeated" in caplog.text


def test_whole_numbers_for_seconds_and_logits_are_read_as_floats(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append(path, [record(0)])
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "seconds": 2, "option_logits": [1, 0]}) + "\n")
    assert records.read(path) == [record(0, seconds=2.0, option_logits=(1.0, 0.0))]


def test_a_users_copy_beside_the_records_is_neither_read_nor_removed(tmp_path):
    path, copy = tmp_path / "records.jsonl", tmp_path / "records.backup.jsonl"
    records.append(path, [record(0)])
    records.append(records.part(path, 2), [record(1)])
    records.append(copy, [record(2)])
    assert records.read(path) == [record(0), record(1)]
    records.gather(path)
    assert records.read(path) == [record(0), record(1)]
    assert copy.exists()
    assert not records.part(path, 2).exists()
