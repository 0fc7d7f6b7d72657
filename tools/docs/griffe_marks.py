"""A griffe extension: docstrings are written for Sphinx's marks, pages for Markdown's."""

from typing import Any

from griffe import Extension, Object

from fusion_plugins.docstrings import as_markdown

__all__ = ["MarkdownMarks"]


class MarkdownMarks(Extension):
    """Rewrites the marks of every docstring that is collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
