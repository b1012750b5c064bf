"""Readers and parsers on any input: a RecordError or a value, never anything else, and in short time."""

import json
import time

import pytest
from helpers import few
from hypothesis import example, given
from hypothesis import strategies as st

from medgr2 import records
from medgr2.errors import RecordError
from medgr2.prompts import (
    TAG,
    format_candidate,
    format_response,
    match_option,
    normalise,
    parse_candidate,
    parse_response,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*records.FIELDS, "overall", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
lines = st.binary(max_size=60) | st.builds(lambda value: json.dumps(value).encode(), json_values)
tags = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<question>",
        "</question>",
        "<options>",
        "</options>",
        " | ",
        "A",
        "CT",
        "C) CT",
        "\n",
        "<",
        "ß",
        "\0",
        "\ud800",
        "<image>",
        "{{ 7*7 }}",
    ]
)
replies = st.lists(tags | st.text(max_size=4), max_size=14).map("".join) | st.text(max_size=60)
options = st.none() | st.lists(st.text(max_size=5), max_size=5)
# Any text without the tags of the form (options: nor their separator). Half a surrogate pair is no text.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda t: not TAG.search(t) and normalise(t)
)
words = texts.map(lambda t: " ".join(t.replace("|", "/").split())).filter(normalise)


@few
@given(st.lists(lines, max_size=4))
@example([b'{"id": "a", "image": "\\u0000"}', b'{"id": 1e999}', b"\xff\xfe", b"[" * 5000])
def test_a_file_of_any_bytes_gives_valid_records_or_a_record_error_of_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(rows))
    try:
        found = list(records.read_records(path))
    except RecordError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        return
    assert len({r["id"] for r in found}) == len(found) > 0
    # What was read can be written and read again.
    assert records.write_records(path, found) == len(found) and list(records.read_records(path)) == found


@few
@given(replies, options)
@example("<think>" * 50 + "<answer>A</answer>", ["a", "b"])
def test_any_reply_is_parsed_as_one_of_the_options_or_has_a_reason(text, options):
    parsed = parse_response(text, options)
    assert (parsed.prediction is None) == (parsed.reason is not None)
    assert parsed.prediction is None or options is None or parsed.prediction in options
    assert not parsed.well_formed or parsed.prediction is not None
    assert not parsed.well_formed or (parsed.rationale is not None) == ("<think>" in text)


@few
@given(replies)
def test_any_candidate_that_is_kept_makes_a_valid_record(text):
    candidate, reason = parse_candidate(text)
    assert (candidate is None) == (reason is not None)
    if candidate:
        records.validate(candidate | {"id": "a", "image": "/a.png"}, records.QUESTION)


@few
@given(texts | st.just(""), texts, st.lists(words, min_size=2, max_size=5, unique_by=normalise), st.data())
def test_a_response_is_parsed_as_it_was_formatted(rationale, answer, options, data):
    parsed = parse_response(format_response(rationale, answer))
    assert parsed == (answer.strip(), None, rationale.strip() if rationale else None, True)
    answer = data.draw(st.sampled_from(options))
    parsed = parse_response(format_response(rationale, answer), options)
    assert parsed == (answer, None, rationale.strip() if rationale else None, True)


@few
@given(
    words.map("Zq {}".format), texts, st.lists(words, min_size=2, max_size=5, unique_by=normalise), st.data()
)
def test_a_candidate_is_parsed_as_it_was_formatted(question, rationale, options, data):
    record = {
        "question": question,
        "options": options,
        "rationale": rationale.strip(),
        "answer": data.draw(st.sampled_from(options)),
    }
    if normalise(rationale) != "reasoning":
        assert parse_candidate(format_candidate(record)) == (record, None)


@pytest.mark.parametrize(
    "text",
    [
        "<question>" * 20_000,
        "<think>" * 30_000,
        "<answer>" * 25_000,
        "<question>a</question>" + "<think>" * 30_000,
        "<think>" + " " * 200_000,
        "<question>a</question>" + "<options>" * 20_000,
        "<think></think>" * 14_000,
        "</answer>" * 20_000 + "<answer>",
        "<question>a" + "</question><options>" * 10_000,
        "(" * 200_000,
        "A" + ")" * 200_000,
        "<question>q</question>" + "\n" * 200_000 + "x",
    ],
)
def test_200_kilobytes_are_parsed_in_less_than_two_seconds(text):
    start = time.process_time()
    parse_response(text, ["a", "b"])
    parse_candidate(text)
    match_option(text, ["a", "b"])
    assert time.process_time() - start < 2
