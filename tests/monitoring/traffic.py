"""Small synthetic traffic: topics with words of their own, sentences of varying form."""

from __future__ import annotations

import random

from monitoring.windows import Row
from regraft.records import CapturedExchange, Message

ORDINARY = {
    "bread": ["loaf", "crust", "oven", "flour", "dough", "rye", "slice", "bakery", "yeast", "bagel"],
    "garden": ["rose", "soil", "shovel", "hedge", "seed", "lawn", "compost", "tulip", "rake", "pond"],
    "bikes": ["saddle", "pedal", "chain", "gear", "tyre", "spoke", "brake", "helmet", "bell", "fork"],
    "music": ["violin", "chord", "tempo", "choir", "drum", "flute", "sonata", "melody", "tune", "harp"],
    "books": ["novel", "chapter", "shelf", "author", "page", "cover", "library", "poem", "index", "verse"],
}
NEW = {
    "space": ["rocket", "orbit", "lunar", "comet", "probe", "galaxy", "crater", "launch", "meteor", "nebula"],
    "sea": ["anchor", "harbour", "tide", "reef", "sail", "lighthouse", "ferry", "whale", "captain", "kelp"],
}
ASKED = ["how do I choose", "please tell me about", "what is the best", "can you explain", "I wonder about"]
TOLD = ["You should look at", "Most people prefer", "It depends on", "We would recommend", "Start with"]


def rows(topics: dict[str, list[str]], count: int, seed: int, prefix: str = "r") -> list[Row]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        words = topics[draw.choice(sorted(topics))]
        asked, told = draw.sample(words, draw.randint(2, 4)), draw.sample(words, draw.randint(3, 6))
        end = draw.choice(["?", "", " today?"])
        prompt = f"{draw.choice(ASKED)} {' and '.join(asked)} number {draw.randint(0, 99999)}{end}"
        made.append(Row(id=f"{prefix}{i}", prompt=prompt, output=f"{draw.choice(TOLD)} {', '.join(told)}."))
    return made


def exchange(row: Row, second: int = 0, **changes: object) -> CapturedExchange:
    fields = {
        "id": row.id,
        "created": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000000+00:00",
        "model": "shop",
        "model_version": 1,
        "messages": (Message(role="user", content=row.prompt),),
        "output": row.output,
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "latency_ms": 1.0,
        **changes,
    }
    return CapturedExchange.model_validate(fields)
