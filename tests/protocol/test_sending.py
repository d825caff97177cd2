"""What a sender sends, in which order, and when it offers again."""

import pytest

from protocol.errors import BadMessage
from protocol.messages import Blob, Grant, Offer
from protocol.sending import MAX_GRANT_CHUNKS, SendChunk, Sending, SendOffer, Uploads

KIB = 1024
MODEL = Blob(sha256="a" * 64, size=9 * KIB + 5, chunk=KIB)
OTHER = Blob(sha256="b" * 64, size=2 * KIB, chunk=KIB)
A, B = MODEL.xfer, OTHER.xfer


def grant(*ranges: tuple[int, int], xfer: str = A) -> Grant:
    return Grant(xfer=xfer, ranges=list(ranges))


def sent(sending: Sending) -> list[tuple[str, str, int]]:
    found = []
    while (chunk := sending.next_chunk()) is not None:
        found.append((chunk.peer, chunk.xfer[0], chunk.index))
    assert sending.n_pending == 0
    return found


@pytest.fixture
def sending() -> Sending:
    sending = Sending()
    sending.add(MODEL)
    sending.add(OTHER)
    return sending


def test_granted_chunks_are_sent_with_their_place(sending: Sending) -> None:
    assert sending.granted("x", grant((0, 1), (8, 2)))
    assert sending.n_pending == 3
    assert sending.next_chunk() == SendChunk("x", A, 0, 0, KIB)
    assert sending.next_chunk() == SendChunk("x", A, 8, 8 * KIB, KIB)
    assert sending.next_chunk() == SendChunk("x", A, 9, 9 * KIB, 5)
    assert sending.next_chunk() is None


def test_peers_are_served_in_turn(sending: Sending) -> None:
    sending.granted("x", grant((0, 4)))
    sending.granted("y", grant((0, 2)))
    sending.granted("x", grant((1, 1), xfer=B))
    assert sent(sending) == [
        ("x", "a", 0),
        ("y", "a", 0),
        ("x", "a", 1),
        ("y", "a", 1),
        ("x", "a", 2),
        ("x", "a", 3),
        ("x", "b", 1),
    ]


def test_a_chunk_granted_again_while_it_waits_is_sent_once(sending: Sending) -> None:
    sending.granted("x", grant((0, 4)))
    sending.next_chunk()
    sending.granted("x", grant((0, 4), (2, 2)))
    assert sent(sending) == [("x", "a", 1), ("x", "a", 2), ("x", "a", 3), ("x", "a", 0)]


def test_an_unknown_transfer_is_answered_not_raised(sending: Sending) -> None:
    assert not sending.granted("x", grant((0, 1), xfer="c" * 32))
    sending.remove(A)
    assert A not in sending
    assert not sending.granted("x", grant((0, 1)))


@pytest.mark.parametrize("ranges", [[(10, 1)], [(9, 2)], [(0, 1), (2**53, 1)], [(0, 4096)], [(0, 10)] * 26])
def test_hostile_ranges_are_refused_whole(sending: Sending, ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(BadMessage):
        sending.granted("x", grant(*ranges))
    assert sent(sending) == []


def test_what_may_wait_for_one_peer_is_bounded() -> None:
    sending = Sending(max_pending=MAX_GRANT_CHUNKS)
    sending.add(Blob(sha256="a" * 64, size=KIB * 10_000, chunk=KIB))
    for first in range(0, 5_000, 250):
        sending.granted("greedy", grant((first, 250)))
    sending.granted("modest", grant((0, 1)))
    assert sending.n_pending == MAX_GRANT_CHUNKS + 1
    assert sending.n_dropped == 5_000 - MAX_GRANT_CHUNKS


def test_credit_is_forgotten_with_the_blob_the_peer_or_the_bus(sending: Sending) -> None:
    sending.granted("x", grant((0, 2)))
    sending.granted("x", grant((0, 1), xfer=B))
    sending.remove(A)
    assert sent(sending) == [("x", "b", 0)]
    sending.granted("x", grant((0, 1), xfer=B))
    sending.granted("y", grant((0, 2), xfer=B))
    sending.drop_peer("x")
    assert sending.next_chunk() == SendChunk("y", B, 0, 0, KIB)
    sending.reset()
    assert sent(sending) == []
    sending.add(Blob(sha256=OTHER.sha256, size=2 * KIB, chunk=2 * KIB))
    sending.granted("y", grant((0, 1), xfer=B))
    assert sending.next_chunk() == SendChunk("y", B, 0, 0, 2 * KIB)


def offer(blob: Blob, round_: int = 1) -> Offer:
    return Offer(job="job", round=round_, attempt=0, kind="lora", blob=blob, samples=10)


def test_an_offer_is_repeated_ever_more_slowly_until_it_is_answered() -> None:
    uploads = Uploads(repeat_s=5, max_repeat_s=15)
    assert uploads.add(offer(MODEL), 0) == [SendOffer(offer(MODEL))]
    times = []
    for _ in range(4):
        assert uploads.wake_at is not None
        times.append(uploads.wake_at)
        assert uploads.tick(uploads.wake_at - 0.1) == []
        assert uploads.tick(uploads.wake_at) == [SendOffer(offer(MODEL))]
    assert times == [5, 15, 30, 45]
    assert uploads.done(A) == offer(MODEL)
    assert uploads.done(A) is None
    assert (uploads.wake_at, len(uploads)) == (None, 0)
    assert uploads.tick(1e9) == uploads.reset(1e9) == []


def test_a_grant_silences_it_until_the_receiver_must_have_forgotten() -> None:
    uploads = Uploads(repeat_s=5, quiet_s=90)
    uploads.add(offer(MODEL), 0)
    uploads.granted(A, 3)
    uploads.granted(B, 3)
    assert uploads.tick(92) == []
    assert uploads.tick(93) == [SendOffer(offer(MODEL))]
    assert uploads.wake_at == 98


def test_a_postponed_offer_comes_back_when_it_was_told_to() -> None:
    uploads = Uploads()
    uploads.add(offer(MODEL), 0)
    uploads.postponed(A, 600, 1)
    assert uploads.wake_at == 601
    uploads.postponed(A, 1e9, 1)
    assert uploads.wake_at == 3601, "nobody puts it off for ever"
    uploads.postponed(A, 600, 1)
    assert uploads.tick(601) == [SendOffer(offer(MODEL))]


def test_everything_is_offered_again_at_once_to_a_reborn_coordinator() -> None:
    uploads = Uploads()
    uploads.add(offer(MODEL), 0)
    uploads.add(offer(OTHER), 1)
    uploads.granted(A, 2)
    uploads.postponed(B, 600, 2)
    assert uploads.reset(3) == [SendOffer(offer(MODEL)), SendOffer(offer(OTHER))]
    assert uploads.wake_at == 8


def test_another_offer_of_the_same_bytes_replaces_the_earlier() -> None:
    uploads = Uploads()
    uploads.add(offer(MODEL, 1), 0)
    assert uploads.add(offer(MODEL, 2), 1) == [SendOffer(offer(MODEL, 2))]
    assert len(uploads) == 1
    assert uploads.done(A) == offer(MODEL, 2)
