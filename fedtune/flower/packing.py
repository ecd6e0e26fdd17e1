"""Pack a short message into one part, since Flower moves a message part by part.

An order and a small adapter, or an update, are eight parts: the message, its dictionary, two
records, and an array and a chunk each for the numbers and their scales. A part is a request from
the coordinator to its SuperLink, one on each site's network and one at the site, in both directions
(some 90 of 170 requests of a round of three sites). Packed, they are three.

| up to MOST bytes  | packed: one record with the dictionary in Flower's protobuf form |
| more              | as Flower sends it, in chunks, which a cut repeats one by one    |
| query.prepare     | never packed: every protocol has to be able to read it           |
| other people's    | unpacked once, whatever is inside                                |

Guarantee: what was packed is unpacked to the same records, byte for byte, so seals and digests
cover what they covered; unpacking holds what was sent, as Flower's own reader would."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.flower import api

MOST = 512 << 10  # half of what an answer may hold beside arrays (replies.WORDS)
PACKED = "packed"
NEVER = "query.prepare"


def pack(message: Message) -> Message:
    """Pack the content of a short message, in place."""
    if message.metadata.message_type != NEVER and message.has_content() and _is_short(message):
        proto = api.recorddict_to_proto(message.content)
        if proto.ByteSize() <= MOST:
            record = ConfigRecord({PACKED: proto.SerializeToString(deterministic=True)})
            message.content = RecordDict({PACKED: record})
    return message


def size(content: RecordDict) -> int:
    """Compute a content's bytes in Flower's protobuf form, unpacked: the same on every grid."""
    return int(api.recorddict_to_proto(content).ByteSize())


def _is_short(message: Message) -> bool:
    """Return whether the arrays are small enough, before a large message is copied to learn its
    exact size."""
    arrays = (
        array for record in message.content.array_records.values() for array in record.values()
    )
    return sum(len(array.data) for array in arrays) <= MOST


def unpack(message: Message) -> Message:
    """Unpack the content of a message, in place; one that is not packed stays as it is.

    Errors: ValueError, DecodeError, and any other error that a crafted message causes in
    Flower's reader."""
    if message.has_content() and list(message.content) == [PACKED]:
        packed = message.content[PACKED]
        if not isinstance(packed, ConfigRecord) or not isinstance(packed[PACKED], bytes):
            raise ValueError("not a packed message")
        message.content = api.recorddict_from_proto(api.ProtoRecordDict.FromString(packed[PACKED]))
    return message
