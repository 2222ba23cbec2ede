"""The connection struct and what keeps the structs consistent (C only)."""

class Core:
    """The part of a reactor that topics use: its base class, not made by itself."""
