"""The connection struct and what keeps the structs consistent (C only)."""

class Core:
    """What topics know of a reactor: its base class, not made by itself."""
