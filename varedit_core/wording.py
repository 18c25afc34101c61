"""Nouns in sentences: their article, and how many there are."""

from __future__ import annotations


def with_article(noun: str) -> str:
    """a mask, an image."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def counted(number: int, noun: str) -> str:
    """1 picture, 2 pictures."""
    return f"{number} {noun}" + "s" * (number != 1)


def there_are(number: int, noun: str) -> str:
    """there is 1 picture, there are 2 pictures."""
    return f"there {'is' if number == 1 else 'are'} {counted(number, noun)}"
