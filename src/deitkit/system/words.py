"""Numbers in sentences."""


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: "1 image", "4,500 images"; the plural takes an s, or es after s (classes)."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
