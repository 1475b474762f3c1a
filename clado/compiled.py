"""Suffixes through torch.compile: one program for each place where a run is resumed, with every weight an input of it.

So a replaced weight needs no new program, and neither does another number of stacked images: the first that differs makes
torch compile once more, for any number. Results differ from the loop's by rounding, so the setting is part of what a store is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from clado.attention import Movement

Tables = Mapping[type, Mapping[int, Any]]  # kind of argument -> slot -> what is read there


def compiled_suffix(steps: Sequence[Any], output_slot: int, tables: Tables, backend: str) -> Callable[[Tables], Tensor]:
    """Instructions (`graph.Instruction`) as one program: what `tables` hold -> the value in `output_slot`.

    `tables` are those of a first run; what is neither a tensor nor an integer there is built in.
    """
    graph = fx.Graph()
    made: dict[int, fx.Node] = {}  # values of the program's own

    def reads(argument: Any) -> Iterator[Any]:
        if type(argument) is list:
            for part in argument:
                yield from reads(part)
        elif type(argument) in tables and _is_input(tables[type(argument)].get(argument.slot)):
            yield argument

    arguments = (argument for step in steps for argument in (*step.arguments, *step.keywords.values()))
    order = list(dict.fromkeys(read for argument in arguments for read in reads(argument)))
    inputs = {read: graph.placeholder(f"input_{place}") for place, read in enumerate(order)}

    def placed(argument: Any) -> Any:
        if type(argument) is list:
            return [placed(part) for part in argument]
        if type(argument) not in tables:
            return argument
        table = tables[type(argument)]
        return made[argument.slot] if argument.slot not in table else inputs.get(argument, table[argument.slot])

    for step in steps:
        given = tuple(placed(argument) for argument in step.arguments)
        keywords = {name: placed(argument) for name, argument in step.keywords.items()}
        if isinstance(step.function, Movement):
            made[step.slot] = step.function.written(graph, *given)
        else:
            made[step.slot] = graph.call_function(step.function, given, keywords)
    graph.output(made[output_slot])
    program = torch.compile(fx.GraphModule({}, graph), backend=backend)

    def run(tables: Tables) -> Tensor:
        result: Tensor = program(*(tables[type(read)][read.slot] for read in order))
        return result

    return run


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor | int) and not isinstance(value, bool)
