"""The addresses on the board: connections and handshakes of each, added up over all workers.

Each segment (`board_map`) has a table of addresses: buckets of four entries. An address is in the
same bucket in every segment, so one look at the bucket's tags, a byte per entry, tells who knows
it: of a new address usually nobody.

The bucket is found by multiplying with random numbers, folding the halves of the product, and
multiplying again (as wyhash does). Once would be universal, too, but leaves neighbours in a
regular pattern, and addresses come in rows. Nobody who does not know the numbers can aim at a
bucket. A hash that is made to withstand those who see its results (BLAKE2) takes three times as
long; these results nobody sees.

An address whose bucket is full in some segment is not listed there. Then too little is counted of
it, so it is refused too late, never wrongly. With as many addresses as the board was made for, that
concerns one in some hundreds.

An entry is two words: ``name << 32 | connections``, and ``window << 32 | before << 16 | current``,
the last two being handshakes in the window before that one, and in it. The name is part of the
hash: two addresses with one name in one bucket would share their counts, which at 500 handshakes
per second happens once in some days. An entry is free when it has no connections and its windows
are over.

A reader may see the two words of an entry at two moments, while it changes hands: then an address
seems to have the first handshake of another. No limit is as small as that.
"""

from typing import Final

from trioserver.board_map import ENTRY_WORDS, USED, WAYS, BoardMap

_HASH: Final = 0xFFFF_FFFF_FFFF_FFFF
_NAME: Final = 0xFFFF_FFFF
_CONNECTIONS: Final = 0xFFFF_FFFF
MOST: Final = 0xFFFF
"""Handshakes of one address, worker and window that are told apart."""


class AddressTable:
    """One worker's part of the table, and its view of all of it.

    Args:
        shared: The memory.
        segment: The part that is ours.
    """

    __slots__ = (
        *("_buckets", "_data", "_entries", "_mine", "_multiplier", "_row", "_segment"),
        *(
            "_second_multiplier",
            "_segment_words",
            "_summand",
            "_tags",
            "_words",
            "bucket",
            "entry",
            "name",
        ),
    )

    def __init__(self, shared: BoardMap, segment: int) -> None:
        self._words = shared.words
        self._data = shared.data
        self._segment = segment
        self._buckets = shared.buckets
        self._tags = shared.tags
        self._row = shared.segments * WAYS
        self._entries = shared.entries
        self._segment_words = shared.segment_words
        self._mine = shared.entries + segment * shared.segment_words
        """First word of our own entries."""
        self._multiplier: int = shared.multiplier
        self._summand: int = shared.summand
        self._second_multiplier = shared.second_multiplier
        self.bucket = self.name = self.entry = 0

    def look(self, key: int, window: int) -> tuple[int, int, int]:
        """Add up what is known of an address, and note where our own entry for it is.

        Args:
            key: Of `peers.address_key`.
            window: The number of this window of time.

        Returns:
            Connections; handshakes in this window and in the one before.
        """
        product = self._multiplier * key + self._summand
        hashed = ((product >> 64 ^ product) & _HASH) * self._second_multiplier >> 32
        self.bucket = bucket = hashed & self._buckets - 1
        self.name = name = hashed >> 32 & _NAME | 1
        self.entry = 0
        words = self._words
        begin = self._tags + bucket * self._row
        tags = self._data[begin : begin + words[USED] * WAYS]
        tag = name % 255 + 1
        at = tags.find(tag)
        connections = current = before = 0
        while at >= 0:
            segment = at // WAYS
            entry = self._entries + segment * self._segment_words
            entry += (bucket * WAYS + at % WAYS) * ENTRY_WORDS
            word = words[entry]
            if word >> 32 == name:
                connections += word & _CONNECTIONS
                word = words[entry + 1]
                if word >> 32 == window:
                    current += word & MOST
                    before += word >> 16 & MOST
                elif word >> 32 == window - 1:
                    before += word & MOST
                if segment == self._segment:
                    self.entry = entry
            at = tags.find(tag, at + 1)
        return connections, current, before

    def note(self, window: int) -> None:
        """Count a handshake of the address that was looked at last."""
        entry = self.entry or self._list(window)
        if not entry:
            return
        word = self._words[entry + 1]
        if word >> 32 == window:
            if word & MOST < MOST:
                self._words[entry + 1] = word + 1
            return
        before = word & MOST if word >> 32 == window - 1 else 0
        self._words[entry + 1] = window << 32 | before << 16 | 1

    def find(self, key: int) -> int:
        """Return the first word of our own entry of an address: its name and its connections.

        Returns:
            0 if it is not listed.
        """
        product = self._multiplier * key + self._summand
        hashed = ((product >> 64 ^ product) & _HASH) * self._second_multiplier >> 32
        bucket = hashed & self._buckets - 1
        name = hashed >> 32 & _NAME | 1
        begin = self._tags + bucket * self._row + self._segment * WAYS
        tags = self._data[begin : begin + WAYS]
        tag = name % 255 + 1
        at = tags.find(tag)
        while at >= 0:
            entry = self._mine + (bucket * WAYS + at) * ENTRY_WORDS
            if self._words[entry] >> 32 == name:
                return entry
            at = tags.find(tag, at + 1)
        return 0

    def _list(self, window: int) -> int:
        """Take a free entry of ours for the address that was looked at last; 0 if there is none."""
        words = self._words
        entry = self._mine + self.bucket * WAYS * ENTRY_WORDS
        for way in range(WAYS):
            word = words[entry]
            # A word of zeros has never been used: window 0 may still be going on.
            if not word or (not word & _CONNECTIONS and words[entry + 1] >> 32 < window - 1):
                tag = self._tags + self.bucket * self._row + self._segment * WAYS + way
                # In this order: nobody finds the new address with the old one's counts.
                self._data[tag] = 0
                words[entry + 1] = 0
                words[entry] = self.name << 32
                self._data[tag] = self.name % 255 + 1
                self.entry = entry
                return entry
            entry += ENTRY_WORDS
        return 0
