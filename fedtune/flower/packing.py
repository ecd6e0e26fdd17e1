"""Pack a short message into one record, since Flower transfers each part of a message separately.

A message with a small adapter, or an update, has eight parts: the message, its dictionary, two
records, two arrays (the numbers and their scales) and one chunk of each array. Each part costs
three requests: one between coordinator and SuperLink, one between site and gateway, and one within
the site. Together these are some 90 of the 170 requests of a round of three sites. A packed message
has three parts.

| up to MOST bytes        | packed: one record with the dictionary in Flower's protobuf form     |
| more than MOST bytes    | not packed: Flower sends chunks, and repeats single ones after a cut |
| query.prepare           | never packed, since every version of the protocol has to read it     |
| a received packed message | unpacked once; a packed dictionary inside is not unpacked          |

Guarantee: a packed message is unpacked to the same records, byte for byte, so seals and digests
stay valid. Unpacking needs as much memory as the message that was sent, like Flower's own reader.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.flower import api

MOST = 512 << 10  # bytes; half of what a message may have without its arrays (replies.WORDS)
PACKED = "packed"
NEVER = "query.prepare"


def pack(message: Message) -> Message:
    """Pack the content of a message into one record, in place, if the message is short. Return the
    same message."""
    if message.metadata.message_type != NEVER and message.has_content() and _is_short(message):
        proto = api.recorddict_to_proto(message.content)
        if proto.ByteSize() <= MOST:
            record = ConfigRecord({PACKED: proto.SerializeToString(deterministic=True)})
            message.content = RecordDict({PACKED: record})
    return message


def size(content: RecordDict) -> int:
    """Return how many bytes a message's unpacked content has in Flower's protobuf form. This number
    is the same for a message over a network and in a simulation."""
    return int(api.recorddict_to_proto(content).ByteSize())


def _is_short(message: Message) -> bool:
    """Return whether the message's arrays have at most MOST bytes. This quick check comes before
    the size of the whole message is computed, which needs a copy of it."""
    arrays = (
        array for record in message.content.array_records.values() for array in record.values()
    )
    return sum(len(array.data) for array in arrays) <= MOST


def unpack(message: Message) -> Message:
    """Unpack the content of a message, in place, if it is packed. Return the same message.

    Errors: ValueError, DecodeError, and any other error that a crafted message causes in
    Flower's reader."""
    if message.has_content() and list(message.content) == [PACKED]:
        packed = message.content[PACKED]
        if not isinstance(packed, ConfigRecord) or not isinstance(packed[PACKED], bytes):
            raise ValueError("not a packed message")
        message.content = api.recorddict_from_proto(api.ProtoRecordDict.FromString(packed[PACKED]))
    return message
