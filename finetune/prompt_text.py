"""The wrapping of PersonaPlex's text prompt."""

TAG = "<system>"  # opens and closes: the closing tag has no slash (NVIDIA/personaplex, wrap_with_system_tags)


def wrap_system_prompt(text: str) -> str:
    """`text` between two `<system>` tags, exactly once; wrapped text is kept, an empty prompt stays empty."""
    text = text.strip()
    if not text or (text.startswith(TAG) and text.endswith(TAG)):
        return text
    return f"{TAG} {text} {TAG}"
