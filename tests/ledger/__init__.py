"""The ledger harness: what was accepted is received or announced as a gap, whatever breaks."""
