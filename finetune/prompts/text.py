"""The wrapping of PersonaPlex's text prompts."""

SYSTEM_TAG = "<system>"  # opens and closes: the closing tag has no slash (NVIDIA/personaplex, wrap_with_system_tags)


def wrap_system_prompt(text: str) -> str:
    """Return `text` between two `<system>` tags; text that has both already is kept, and an empty one stays empty."""
    text = text.strip()
    if not text or (text.startswith(SYSTEM_TAG) and text.endswith(SYSTEM_TAG)):
        return text
    return f"{SYSTEM_TAG} {text} {SYSTEM_TAG}"
