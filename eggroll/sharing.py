"""How a population of members of one layer each is shared out: among groups, and among layers."""


def usual_groups(population: int, layers: int, difference: str) -> int:
    """How many groups to make of a population: up to 16 that share it evenly, and not so many
    that a layer is left with fewer than 16 members in each."""
    each = 2 if difference == "central" else 1
    fitting = (g for g in (16, 8, 4, 2) if population % (g * each) == 0)
    return next((g for g in fitting if population >= 16 * g * layers), 1)


def share_equally(total: int, most: list[int | None]) -> list[int]:
    """`total` in nearly equal shares, of which none exceeds its own `most`."""
    shares = [0] * len(most)
    open_shares = list(range(len(most)))
    while open_shares and total > 0:
        each, more = divmod(total, len(open_shares))
        full = [i for i in open_shares if most[i] is not None and most[i] <= each + (more > 0)]
        for place, i in enumerate(full or open_shares):
            shares[i] = most[i] if full else each + (place < more)
            total -= shares[i]
        open_shares = [i for i in open_shares if i not in full] if full else []
    return shares
