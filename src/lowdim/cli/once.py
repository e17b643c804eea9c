"""Commands whose options may be given once: of a second value, the first would be lost without a word."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["OnceCommand", "is_number"]


class OnceCommand(TyperCommand):
    """Refuses an option with one value that is given twice; flags may be repeated, and repeatable options add up.

    A number may be given again, as people do to change a line from the shell's history: the last counts, and this is said.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            typer.BadParameter: an option with one value is given more than once.
        """
        if not ctx.resilient_parsing:
            given: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
            single = [p for p in given if p.param_type_name == "option" and not (p.multiple or p.is_flag or p.count)]
            for parameter in dict.fromkeys(single):
                if single.count(parameter) > 1:
                    name = next((each for each in parameter.opts if each.startswith("--")), parameter.opts[0])
                    if is_number(parameter):
                        typer.echo(f"note: {name} is given {single.count(parameter)} times; the last value counts", err=True)
                        continue
                    raise typer.BadParameter(f"{name} is given {single.count(parameter)} times; it takes one value", ctx=ctx)
        return super().parse_args(ctx, args)


def is_number(parameter: Any) -> bool:
    """Whether an option takes a number, also beside a word (`metavar="N|word"`); typer keeps the annotation, click the type."""
    if (parameter.metavar or "").startswith("N|"):
        return True
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    return annotation in (int, float) or getattr(getattr(parameter, "type", None), "name", "") in ("integer", "float")
