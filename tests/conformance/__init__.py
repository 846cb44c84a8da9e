"""Conformance: recorded and hand-made provider streams, played to a real worker over real HTTP."""
