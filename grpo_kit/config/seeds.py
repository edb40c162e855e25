"""Randomness without state: the seed of every stream is computed from what the stream is for."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A seed of 63 bits from the parts that name a random stream: (run seed, iteration, prompt, sample, purpose).

    Different parts give unrelated streams, the same parts give the same seed on every machine.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
