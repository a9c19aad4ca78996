"""A job's plan as text: its limits, and the steps of its start. Pure."""

from itertools import groupby
from textwrap import wrap

from jobworker.cli.failures import one_line as visible
from jobworker.model.job import Limits
from jobworker.model.units import format_limit
from jobworker.protocol.messages import Plan


def render_plan(plan: Plan) -> str:
    """Lines for people; steps of one kind that follow one another stand together."""
    lines = ["Limits:", *(f"  {text}" for text in _limits(plan.limits)), "Steps:"]
    width = max((len(step.name) for step in plan.steps), default=0)
    kinds = groupby(plan.steps, lambda step: (step.name, step.explanation))
    for number, ((name, explanation), group) in enumerate(kinds, start=1):
        lines.append(f"  {number:2}. {name:{width}}  {explanation}")
        subjects = ", ".join(step.subject for step in group if step.subject)
        margin = " " * (width + 8)
        lines += wrap(
            f"({visible(subjects)})" if subjects else "",
            max(100, width + 48),
            initial_indent=margin,
            subsequent_indent=f"{margin} ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _limits(limits: Limits) -> list[str]:
    def told(value: int | None, text: str) -> str:
        return text if value else "no limit"

    memory, disk, output = limits.memory_bytes, limits.disk_bytes, limits.output_bytes
    return [
        f"CPU: {told(limits.cpu_percent, f'{limits.cpu_percent} % of a core')}",
        f"Memory: {told(memory, format_limit(memory or 0))}",
        f"I/O: {told(limits.io_bps, f'{format_limit(limits.io_bps or 0)}/s')}",
        f"Processes: {told(limits.processes, str(limits.processes))}",
        f"Disk: {told(disk, format_limit(disk or 0))}",
        f"Output: {told(output, format_limit(output or 0))}",
    ]
