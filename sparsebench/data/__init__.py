"""Data sets, split into fit, dev and test that never mix: `text` (documents to token windows), `images`, `labelled`."""
