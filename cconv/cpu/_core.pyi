"""Types of the compiled core; see _core.pyx."""

def instruction_sets() -> list[tuple[str, bool, int, int, int]]: ...

class Buffer:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
