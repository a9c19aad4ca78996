"""Output as text: nothing lost but what is no text, wherever the pieces are cut."""

import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from jobworker.model.job import Stream
from jobworker.protocol.messages import OutputHeader
from jobworker.protocol.text_output import TextOutput

from ..strategies import examples


def header(offset: int, stream: Stream) -> OutputHeader:
    time = datetime(2026, 1, 31, 12, tzinfo=UTC)
    return OutputHeader(subscription=7, stream=stream, offset=offset, time=time)


def sent(pieces: list[tuple[Stream, bytes]]) -> tuple[dict[str, str], list[dict[str, object]]]:
    """What each stream reads in the end, and the parameters of every message."""
    output, offset, messages = TextOutput(), 0, []
    for stream, data in pieces:
        messages.append(output.encode(header(offset, stream), data))
        offset += len(data)
    messages += output.flush(offset)
    assert output.flush(offset) == ()
    told = [json.loads(message)["params"] for message in messages]
    read = {stream.value: "" for stream in Stream}
    for params in told:
        read[params["stream"]] += params["text"]
    assert sum(params["bytes"] for params in told) == offset
    return read, told


@examples(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(Stream), st.binary(max_size=6)), max_size=12))
def test_pieces_read_as_their_stream_would_in_one(pieces: list[tuple[Stream, bytes]]) -> None:
    read, _ = sent(pieces)
    for stream in Stream:
        whole = b"".join(data for which, data in pieces if which is stream)
        assert read[stream.value] == whole.decode("utf-8", "replace")


@examples(max_examples=200)
@given(st.text(), st.data())
def test_text_cut_anywhere_comes_whole(text: str, data: st.DataObject) -> None:
    raw = text.encode("utf-8")
    cut = data.draw(st.integers(0, len(raw)))
    read, _ = sent([(Stream.STDOUT, raw[:cut]), (Stream.STDERR, b"-"), (Stream.STDOUT, raw[cut:])])
    assert read == {"stdout": text, "stderr": "-"}


def test_character_that_is_never_completed_is_marked_at_the_end() -> None:
    read, told = sent([(Stream.STDERR, b"a\xe2\x82")])
    assert read["stderr"] == "a\ufffd"
    assert [(params["text"], params["bytes"], params["offset"]) for params in told] == [
        ("a", 3, 0),
        ("\ufffd", 0, 3),
    ]


def test_piece_that_is_part_of_a_character_is_sent_without_text() -> None:
    _, told = sent([(Stream.STDOUT, b"\xe2"), (Stream.STDOUT, b"\x82\xac")])
    assert [(params["text"], params["bytes"]) for params in told] == [("", 1), ("€", 2)]
