"""The form that a body asks of an answer's text, as a grammar."""

from collections.abc import Callable

from ..errors import OptionError
from .errors import from_option
from .fields import Fields


def read_format(fields: Fields | None, flat: bool = False) -> Callable[[], str] | None:
    """What makes the grammar of response_format (or, flat, of text.format of responses); None is any text."""
    if fields is None:
        return None
    kind = fields.choice("type", ("text", "json_object", "json_schema"), "")
    if kind != "json_schema":
        fields.finish()
        return None if kind == "text" else _json_object
    inner = fields if flat else fields.object("json_schema")
    if inner is None:
        raise fields.error("json_schema", "an object with name and schema")
    inner.take("name", str)
    inner.take("description", str)
    inner.take("strict", bool)  # the schema is always kept
    schema = inner.any("schema")
    if not isinstance(schema, dict | bool):
        raise inner.error("schema", "a JSON schema")
    inner.finish()
    fields.finish()
    where = inner.path("schema")

    def grammar_of_schema() -> str:
        from ..generation import grammar

        try:
            return grammar.json_schema(schema)
        except OptionError as error:
            raise from_option(error, where) from None

    return grammar_of_schema


def _json_object() -> str:
    from ..generation import grammar

    return grammar.json_object()
