"""Shares of a turn: large for few, small for many, and never more than is to be had."""

from contextlib import ExitStack

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.server.traffic import LEAST_BYTES, TURN_BYTES, Traffic


def test_few_send_large_pieces_and_many_small_ones() -> None:
    traffic = Traffic()
    with ExitStack() as sending:
        shares = [sending.enter_context(traffic.share()) for _ in range(1000)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == PIECE_BYTES
        assert shares[-1] == LEAST_BYTES
        for number, share in enumerate(shares, 1):
            assert share == LEAST_BYTES or share * number <= TURN_BYTES
        assert sum(shares) < 8 * TURN_BYTES
    with traffic.share() as alone:
        assert alone == PIECE_BYTES
