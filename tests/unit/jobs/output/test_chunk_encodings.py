"""Forms of a chunk: each is made once, for the first who asks."""

from functools import partial

from jobworker.jobs.output.chunk_encodings import ChunkEncodings, Parts


def test_form_is_made_once_and_each_has_its_own() -> None:
    forms, made = ChunkEncodings(), list[str]()

    def maker(name: str) -> Parts:
        made.append(name)
        return name.encode(), b"data"

    for _ in range(2):
        for name in ("binary", "base64"):
            assert forms.get(name, partial(maker, name)) == (name.encode(), b"data")
    assert made == ["binary", "base64"]
