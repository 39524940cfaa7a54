"""multipart/related as it streams in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radloop.dicom.multipart import Multipart, MultipartError, Part, boundary_of

BOUNDARY = b"b0und"
bodies = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([b"\r\n", b"--", b"--b0un", b"\r\n--b0un", b"\r\n--b0unD", b"b0und", b"\r", b"x"]), max_size=12
    ).map(b"".join),
).filter(lambda body: b"\r\n--b0und" not in b"\r\n" + body)


def message(parts: list[bytes], *, lengths: bool = True, preamble: bytes = b"") -> bytes:
    """Return what a server would send."""
    out = bytearray(preamble)
    for body in parts:
        length = f"Content-Length: {len(body)}\r\n".encode() if lengths else b""
        out += b"\r\n--" + BOUNDARY + b"\r\nContent-Type: application/dicom\r\n" + length + b"\r\n" + body
    return bytes(out + b"\r\n--" + BOUNDARY + b"--\r\n")


def parse(data: bytes, cut: int, *, most: int = 1 << 20) -> list[Part]:
    """Return the parts of a message that comes in pieces."""
    parser = Multipart(BOUNDARY, max_part_bytes=most)
    parts = [part for at in range(0, len(data), cut) for part in parser.feed(data[at : at + cut])]
    parser.end()
    return parts


@given(st.lists(bodies, max_size=5), st.integers(1, 60), st.booleans(), st.sampled_from([b"", b"preamble", b"--b0u"]))
def test_parts_come_out_as_they_went_in(parts: list[bytes], cut: int, lengths: bool, preamble: bytes) -> None:
    """A byte lost or added at the edge of two packets is a broken image."""
    found = parse(message(parts, lengths=lengths, preamble=preamble), cut)
    assert [part.body for part in found] == parts
    assert all(part.headers["content-type"] == "application/dicom" for part in found)


def test_the_first_boundary_may_be_the_first_line() -> None:
    """Orthanc begins so; others send an empty line first."""
    assert [part.body for part in parse(message([b"one", b"two"])[2:], 7)] == [b"one", b"two"]


def test_a_wrong_length_is_not_believed() -> None:
    """A server that counts wrong must not make two instances of one, or none of two."""
    data = message([b"12345", b"678"]).replace(b"Content-Length: 5", b"Content-Length: 4")
    assert [part.body for part in parse(data, 9)] == [b"12345", b"678"]
    data = message([b"12345", b"678"]).replace(b"Content-Length: 5", b"Content-Length: 6")
    assert [part.body for part in parse(data, 9)] == [b"12345", b"678"]


@given(st.lists(bodies, min_size=1, max_size=3), st.data())
def test_a_message_that_ends_early_is_an_error(parts: list[bytes], data: st.DataObject) -> None:
    """A connection that broke between two instances looks like a shorter study."""
    whole = message(parts)
    end = data.draw(st.integers(0, len(whole) - 3))
    with pytest.raises(MultipartError, match="before its last boundary"):
        parse(whole[:end], 16)


def test_a_part_that_is_too_large_is_refused_while_it_comes() -> None:
    """A server that never ends a part must not fill the memory."""
    parser = Multipart(BOUNDARY, max_part_bytes=1000)
    list(parser.feed(b"--b0und\r\nContent-Type: application/dicom\r\n\r\n"))
    list(parser.feed(bytes(900)))
    with pytest.raises(MultipartError, match="larger than 1000 bytes"):
        list(parser.feed(bytes(500)))
    with pytest.raises(MultipartError, match="headers of a part do not end"):
        list(Multipart(BOUNDARY, max_part_bytes=1000).feed(b"--b0und\r\n" + b"x" * 20_000))


@pytest.mark.parametrize("wrong", ["text/html", "multipart/related", "multipart/related; boundary=", "", "a"])
def test_no_boundary(wrong: str) -> None:
    """An error page is no study."""
    with pytest.raises(MultipartError, match="no multipart message"):
        boundary_of(wrong)


def test_boundaries_are_read_quoted_or_not() -> None:
    """Servers write both."""
    assert boundary_of('multipart/related; type="application/dicom"; boundary="a b=c"') == b"a b=c"
    assert boundary_of("multipart/related;boundary=xyz;type=application/dicom") == b"xyz"
