"""Render a job's plan as text: its limits, and the steps of its start. Pure."""

from itertools import groupby
from textwrap import wrap

from jobworker.cli.command_line.failures import one_line as visible
from jobworker.model.job import Limits
from jobworker.model.units import format_limit
from jobworker.protocol.messages import Plan


def render_plan(plan: Plan) -> str:
    """Render a plan for people; consecutive steps of one kind share a line."""
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
    def limit_or_none(value: int | None, text: str) -> str:
        return text if value else "no limit"

    memory, disk, output = limits.memory_bytes, limits.disk_bytes, limits.output_bytes
    return [
        f"CPU: {limit_or_none(limits.cpu_percent, f'{limits.cpu_percent} % of a core')}",
        f"Memory: {limit_or_none(memory, format_limit(memory or 0))}",
        f"I/O: {limit_or_none(limits.io_bps, f'{format_limit(limits.io_bps or 0)}/s')}",
        f"Processes: {limit_or_none(limits.processes, str(limits.processes))}",
        f"Disk: {limit_or_none(disk, format_limit(disk or 0))}",
        f"Output: {limit_or_none(output, format_limit(output or 0))}",
    ]
