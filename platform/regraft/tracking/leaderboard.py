"""A leaderboard as a Markdown table, for the artifact pane of MLflow."""

from __future__ import annotations

from regraft.records import Leaderboard, LeaderboardRow
from regraft.selection.render import markdown_table


def markdown(leaderboard: Leaderboard) -> str:
    """Render a leaderboard for people."""
    names = sorted({name for row in leaderboard.rows for name in row.metrics})
    head = ["rank", "trial", "status", leaderboard.objective, "final", "Pareto", *names]
    lines = [
        f"# Sweep {leaderboard.sweep_id}",
        "",
        f"Dataset {leaderboard.dataset_id}. {leaderboard.winner_reason or 'No winner.'}",
        "",
    ]
    rows = [_cells(row, names, row.key == leaderboard.winner_key) for row in leaderboard.rows]
    lines.append(markdown_table([head, *rows]))
    return "\n".join(lines) + "\n"


def _cells(row: LeaderboardRow, names: list[str], wins: bool) -> list[str]:
    quality = row.quality
    interval = f"{quality.mean:.4f} [{quality.low:.4f}, {quality.high:.4f}]" if quality else ""
    interval += f", {len(row.seeds)} seeds {min(row.seeds):.4f} to {max(row.seeds):.4f}" if row.seeds else ""
    label = f"**{row.label}**" if wins else row.label
    return [
        "" if row.rank is None else str(row.rank),
        f"{label} (control)" if row.is_control else label,
        f"{row.status}: {row.reason}" if row.reason else row.status,
        interval,
        f"{row.final.mean:.4f} [{row.final.low:.4f}, {row.final.high:.4f}]" if row.final else "",
        "yes" if row.on_pareto_front else "",
        *(f"{row.metrics[name]:.6g}" if name in row.metrics else "" for name in names),
    ]
