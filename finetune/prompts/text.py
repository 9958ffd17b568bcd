"""The wrapping of PersonaPlex's text prompt."""

SYSTEM_TAG = "<system>"  # opens and closes: the closing tag has no slash (NVIDIA/personaplex, wrap_with_system_tags)


def wrap_system_prompt(text: str) -> str:
    """`text` between two `<system>` tags, exactly once; wrapped text is kept, an empty prompt stays empty."""
    text = text.strip()
    if not text or (text.startswith(SYSTEM_TAG) and text.endswith(SYSTEM_TAG)):
        return text
    return f"{SYSTEM_TAG} {text} {SYSTEM_TAG}"
