"""How kindly a text speaks: where it lies between sentences of praise and sentences of complaint.

The sentences are ours and come in pairs that speak of the same thing, so that what they speak of cancels out;
what remains is a direction in the space of sentence embeddings. Nothing is downloaded beside the embedding
model.

Measured with the bundled MiniLM on 1,600 sentences that people rated as clearly kind or unkind (Hutto and
Gilbert, ICWSM 2014: at least 1 of 4 from neutral): the sign agrees on 82 %, of newspaper editorials on 87 %,
tweets 85 %, reviews of products 82 % and of films 75 %. Classifiers trained on the same pairs did worse. It
is coarse and English, and meant for averages over many texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

#: Kind and unkind words about the same things.
ANCHORS: tuple[tuple[str, str], ...] = (
    ("I love this product, it works perfectly.", "I hate this product, it does not work at all."),
    ("The food was delicious.", "The food was disgusting."),
    ("What a wonderful film, I enjoyed every minute.", "What a terrible film, I was bored throughout."),
    ("Thank you so much, you solved my problem.", "This is useless, you did not solve my problem."),
    ("I am very happy with the service.", "I am very angry about the service."),
    ("The staff were friendly and helpful.", "The staff were rude and unhelpful."),
    ("It arrived early and in perfect condition.", "It arrived late and broken."),
    ("The battery lasts for ages, which is great.", "The battery dies at once, which is awful."),
    ("The app is fast and easy to use.", "The app is slow and keeps crashing."),
    ("I would recommend it to everyone.", "I would warn everyone against it."),
    ("The doctor says I have recovered fully.", "The doctor says it has got much worse."),
    ("We won, what a great day!", "We lost, what a horrible day."),
    ("The new law is a success and helps many people.", "The new law is a disaster and hurts many people."),
    ("Profits rose and investors are delighted.", "Losses grew and investors are alarmed."),
    ("She smiled and felt loved.", "She cried and felt abandoned."),
    ("He is honest, kind and brave.", "He is a liar, cruel and a coward."),
    ("Congratulations, that is excellent news!", "Sorry, that is dreadful news."),
    ("The hotel room was clean and comfortable.", "The hotel room was dirty and noisy."),
    ("The instructions are clear and simple.", "The instructions are confusing and wrong."),
    ("Good morning, I slept well and feel fine.", "I could not sleep and feel sick."),
    ("The weather is lovely.", "The weather is miserable."),
    ("It was worth every penny.", "It was a waste of money."),
    ("I had no trouble at all setting it up.", "I had nothing but trouble setting it up."),
    ("A brilliant performance, funny and moving.", "A dull performance, clumsy and tedious."),
    ("The sound quality is superb.", "The sound quality is poor."),
    ("I am proud of what we achieved.", "I am ashamed of how we failed."),
    ("The peace talks brought hope.", "The war brought death and fear."),
    ("You are right, that is a good question.", "You are wrong, that is a stupid question."),
    ("Yes, of course, I would be glad to help.", "No, I refuse, leave me alone."),
    ("The refund came quickly and I am satisfied.", "The refund never came and I feel cheated."),
)


Embed = Callable[[Sequence[str]], NDArray[np.float32]]


def tones(texts: Sequence[str | None], embed: Embed) -> NDArray[np.float64]:
    """How kindly texts speak: above 0 kindly, below 0 unkindly, between -2 and 2.

    Args:
        texts: Any texts; one without a letter has the tone 0.
        embed: Gives each text a vector of unit length, such as `Calibrated.embed`.
    """
    given = [text or "" for text in texts]
    if not given:
        return np.zeros(0)
    towards, middle = _direction(embed)
    found = np.asarray(embed(given), dtype=np.float64) @ towards - middle
    spoken = np.array([any(map(str.isalpha, text)) for text in given])
    # Vectors of the same text differ in their last digits with what was embedded beside it.
    return np.asarray(np.where(spoken, np.round(found, 5), 0.0))


def _direction(embed: Embed) -> tuple[NDArray[np.float64], float]:
    """The unit vector from unkind to kind, and where on it the middle between them lies."""
    kind, unkind = (np.asarray(embed(list(side)), dtype=np.float64) for side in zip(*ANCHORS, strict=True))
    towards = (kind - unkind).mean(axis=0)
    length = float(np.linalg.norm(towards))
    # An embedding that cannot tell them apart has no tone.
    towards = towards / length if length > 1e-6 else towards * 0.0
    return towards, float(((kind + unkind) / 2 @ towards).mean())
