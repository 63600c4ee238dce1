"""Best-of-n estimators for pools of scored samples: value, win rate, KL, intervals. Pure NumPy.

Shape legend: P prompts, N samples per prompt, K values of n, m top ranks kept, B proxy blocks.
A *block* is a set of samples with equal proxy score. Best-of-n picks one of a block at random, and results are the
exact expectation over these picks. (Picking the first one would make them depend on the order of the file.)

Sources: Nakano et al. 2021 (WebGPT, 2112.09332, appendix on best-of-n) for the estimator over all subsets; Gao et al.
2023 (2210.10760) for log n - (n-1)/n; Beirami et al. 2024 (2401.01879) for why that is only an upper bound. For pools
of unequal size call the functions once per size, because the weights depend on N.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Rank weights are cut off where all lower ranks together have less mass than this.
CUT_MASS = 1e-16
POOL_SIZE = "the number of samples per prompt"  # why n is limited, in errors


def subset_weights(N: int, n: int) -> Array:
    """Probability that the sample of rank N, N-1, ... (best first) tops a random n-subset.

    Returns [m], m = min(N-n+1, ceil(N ln(1e16) / n)); sums to 1 within rounding. The weight of
    ascending rank i is C(i-1, n-1) / C(N, n) (Nakano et al. 2021).
    """
    N, n = int(_check_n(N, "N")), int(_check_n(n, "n", most=N))
    # The mass below the top m ranks is C(N-m, n)/C(N, n) <= exp(-mn/N). The cut reduces the N^2 terms for all n to
    # N ln(1e16) H_N, so no caller needs a coarse grid of n for speed.
    m = min(N - n + 1, math.ceil(N * math.log(1 / CUT_MASS) / n))
    # w_N = n/N, then w_{i-1} = w_i (i-n)/(i-1): all factors are in (0, 1], so nothing overflows, and there are no
    # factorials or big integers.
    rank = np.arange(N, N - m + 1, -1, dtype=np.float64)
    return np.cumprod(np.concatenate(([n / N], (rank - n) / (rank - 1))))


def best_of_n(proxy: ArrayLike, value: ArrayLike, ns: ArrayLike) -> Array:
    """Expected `value` of the best of n by `proxy`: unbiased, the mean over all n-subsets.

    proxy [P, N], value [P, N] (gold, the proxy itself, length, ...), ns [K] with 1 <= n <= N
    -> [P, K] in units of `value`. Near n = N a prompt has few different subsets, so its value is noisy; a mean over
    prompts is not, and its interval over prompts holds up to n = N.
    """
    proxy_PN = _check_scores(proxy, "proxy")
    value_PN = _check_scores(value, "value", like=proxy_PN)
    P, N = proxy_PN.shape
    ns_K = _check_ns(ns, most=N)
    order_PN = np.argsort(-proxy_PN, axis=1, kind="stable")  # best first, as subset_weights
    proxy_PN = np.take_along_axis(proxy_PN, order_PN, axis=1)
    value_PN = _block_means(proxy_PN, np.take_along_axis(value_PN, order_PN, axis=1))
    result_PK = np.empty((P, len(ns_K)))
    for k, n in enumerate(ns_K):
        weights = subset_weights(N, n)
        result_PK[:, k] = value_PN[:, : len(weights)] @ weights
    return result_PK


def oracle(gold: ArrayLike, ns: ArrayLike) -> Array:
    """Best-of-n by the gold score itself, the upper bound for every proxy. [P, N], [K] -> [P, K]."""
    return best_of_n(gold, gold, ns)


def win_rate(proxy: ArrayLike, gold: ArrayLike, ns: ArrayLike) -> Array:
    """Probability that the best of n by `proxy` beats one independent base sample on `gold`.

    proxy [P, N], gold [P, N], ns [K] with 1 <= n <= N-1 -> [P, K] in [0, 1]; a gold tie counts 1/2.
    Unbiased: the mean over all n-subsets and all samples outside them (U-statistic of order n+1).
    1/2 at n = 1; n/(n+1) for a perfect proxy without ties (the bound of Beirami et al. 2024).
    """
    proxy_PN = _check_scores(proxy, "proxy")
    gold_PN = _check_scores(gold, "gold", like=proxy_PN)
    P, N = proxy_PN.shape
    ns_K = _check_ns(ns, most=N - 1, why="as one sample must remain as the base sample")
    above_PN, below_PN = np.empty((P, N)), np.empty((P, N))
    for p in range(P):
        above_PN[p], below_PN[p] = _wins_by_rank(proxy_PN[p], gold_PN[p])
    result_PK = np.empty((P, len(ns_K)))
    for k, n in enumerate(ns_K):
        weights = subset_weights(N, n)
        m = len(weights)
        rank = np.arange(N, N - m, -1, dtype=np.float64)
        # Of the subsets topped by rank i, the share that leaves out one given lower sample is
        # C(i-2, n-1)/C(i-1, n-1). Rank 1 has no lower sample, hence the maximum against 0/0.
        leaves_out = (rank - n) / np.maximum(rank - 1, 1)
        wins_P = above_PN[:, :m] @ weights + below_PN[:, :m] @ (weights * leaves_out)
        result_PK[:, k] = wins_P / (N - n)
    return result_PK


def _wins_by_rank(proxy_N: Array, gold_N: Array) -> tuple[Array, Array]:
    """Expected gold wins of the sample at each proxy rank, best first, over samples ranked
    (above, below) it by proxy: two [N], in wins. O(N log N)."""
    N = len(proxy_N)
    order = np.argsort(-proxy_N, kind="stable")
    proxy_N, gold_N = proxy_N[order], gold_N[order]
    # wins = (opponents + won - lost) / 2 counts a gold tie as 1/2, so carry net = won - lost.
    net_lower = count_lower_in_both(proxy_N, gold_N) - count_lower_in_both(proxy_N, -gold_N)
    gold_sorted = np.sort(gold_N)
    left, right = (np.searchsorted(gold_sorted, gold_N, side=s) for s in ("left", "right"))
    net_all = left - (N - right)
    # Within a block the win of one sample is the loss of another, so the mean net is 0. Hence the block means over
    # strictly lower proxies are right for "ranked below" with ties broken at random.
    net_lower, net_all = _block_means(proxy_N[None], np.stack([net_lower, net_all]))
    num_above = np.arange(N)
    return (num_above + net_all - net_lower) / 2, (N - 1 - num_above + net_lower) / 2


def count_lower_in_both(proxy_N: Array, gold_N: Array) -> NDArray[np.int64]:
    """For each sample, how many others are strictly lower in proxy and in gold. [N]."""
    # The order is such that tied samples never count as "earlier and smaller": golds descend within a proxy block,
    # and of equal golds the later one gets the smaller rank.
    order = np.lexsort((-gold_N, proxy_N))
    position = np.arange(len(order))
    rank = np.empty_like(position)
    rank[np.lexsort((-position, gold_N[order]))] = position
    count = np.empty_like(position)
    count[order] = _smaller_before(rank)
    return count


def _smaller_before(rank_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each position of a permutation of 0..N-1, how many earlier entries are smaller. [N].

    The highest bit in which two numbers differ decides which is smaller. So go from the highest bit down, keep the
    numbers in groups with equal higher bits, in their original order, and add to each number with the bit set how many
    numbers without it come before it in its group. O(N) per bit, without a Python loop over N.
    """
    position = np.arange(len(rank_N))
    grouped = rank_N
    count_by_rank = np.zeros_like(position)
    for bit in reversed(range((len(rank_N) - 1).bit_length())):
        is_low = (grouped >> bit) & 1 == 0
        lows_before = np.cumsum(is_low) - is_low
        # A permutation has every smaller number exactly once: a group starts at its least member.
        start = (grouped >> (bit + 1)) << (bit + 1)
        lows_before -= lows_before[start]
        count_by_rank[grouped] += np.where(is_low, 0, lows_before)
        # Stable split of each group: lows first (2^bit of them where any high exists), then highs.
        place = np.where(is_low, start + lows_before, (1 << bit) + position - lows_before)
        split = np.empty_like(grouped)
        split[place] = grouped
        grouped = split
    return count_by_rank[rank_N]


def kl_bound(n: ArrayLike) -> Array:
    """KL(best-of-n || base) in nats if no two samples tie: log n - (n-1)/n. Shape of n.

    Exact for a continuous proxy (Gao et al. 2023); an upper bound if samples can repeat or tie (Beirami et al. 2024).
    No pool is needed, so n is not limited.
    """
    n = _check_n(n, "n")
    return np.log(n) - (n - 1) / n


def kl_discrete(block_probabilities: ArrayLike, n: ArrayLike) -> Array:
    """Exact KL(best-of-n || base) in nats for a proxy with finitely many values. Shape of n.

    block_probabilities [B]: base mass of each proxy value, in ascending proxy order, sum 1.
    KL = sum_b P_b log(P_b / p_b) with P_b = F_b^n - F_{b-1}^n, F the cumulative mass.
    """
    p = np.asarray(block_probabilities, dtype=np.float64)
    if p.ndim != 1 or not np.all(p >= 0) or not abs(p.sum() - 1) <= 1e-6:  # NaN fails these too
        fault = f"block_probabilities has shape {p.shape}, sum {p.sum():.9g}"
        raise ValueError(f"{fault}; pass one dimension of masses >= 0 that sum to 1")
    n = _check_n(n, "n")
    p = p[p > 0] / p.sum()
    F = np.minimum(np.cumsum(p), 1)
    above = np.append(np.cumsum(p[:0:-1])[::-1], 0.0)
    # For large n, F^n depends on 1 - F, so near 1 log F is computed from the mass above.
    log_F = np.where(F < 0.5, np.log(F), np.log1p(-np.minimum(above, 0.5)))
    with np.errstate(divide="ignore"):  # log(1 - 1) = -inf for the lowest block is right
        log_left = np.log1p(-np.minimum(p / F, 1))
    kl = np.empty(n.shape)
    for at, each in np.ndenumerate(n):
        # P_b = F_b^n (1 - (F_{b-1}/F_b)^n) in logs, so that masses near 0 and near 1 keep their digits.
        log_P = each * log_F + np.log(-np.expm1(each * log_left))
        kl[at] = np.sum(np.exp(log_P) * (log_P - np.log(p)))
    return kl[()]


def kl_with_atom(n: ArrayLike, eps: ArrayLike) -> Array:
    """KL(best-of-n || base) in nats if the best response has base mass eps and the rest is continuous.

    n and eps broadcast. It is kl_bound(n) at eps = 0, and never above -log eps. It follows from splitting the KL
    integral at the atom; eps = pi_0(chosen text) as in Beirami et al. 2024.
    """
    n, eps = _check_n(n, "n"), np.asarray(eps, dtype=np.float64)
    if not np.all((eps >= 0) & (eps <= 1)):
        raise ValueError(f"eps={eps} is not a probability; pass base mass between 0 and 1")
    is_inside = (eps > 0) & (eps < 1)
    inner = np.where(is_inside, eps, 0.5)  # placeholder: the two limits are set below
    log_rest = np.log1p(-inner)
    top = -np.expm1(n * log_rest)
    rest = np.exp(n * log_rest) * (np.log(n) + (n - 1) * log_rest - (n - 1) / n)
    return np.where(is_inside, rest + top * np.log(top / inner), (eps == 0) * kl_bound(n))[()]


def kl_pool(proxy: ArrayLike, ns: ArrayLike) -> Array:
    """Plug-in KL(best-of-n || base) in nats: each sample has base mass 1/N, and ties are blocks.

    proxy [P, N], ns [K] with 1 <= n <= N -> [P, K]. It cannot exceed log N, so it is biased downwards for n near N. It
    shows how far ties alone lower the KL below kl_bound.
    """
    proxy_PN = _check_scores(proxy, "proxy")
    P, N = proxy_PN.shape
    ns_K = _check_ns(ns, most=N)
    sizes = (np.unique(row, return_counts=True)[1] for row in proxy_PN)
    return np.array([kl_discrete(size / N, ns_K) for size in sizes]).reshape(P, len(ns_K))


def _block_means(proxy_PN: Array, value_PN: Array) -> Array:
    """Replace each value by the mean of its proxy block; rows must be sorted by proxy.

    This is the exact expectation with ties broken at random: given the best block of a subset, each member of the block
    is equally likely to be chosen.
    """
    is_start = np.ones(value_PN.shape, dtype=bool)
    is_start[:, 1:] = proxy_PN[:, 1:] != proxy_PN[:, :-1]
    block = np.cumsum(is_start.ravel()) - 1  # every row starts a block, so no block spans two rows
    means = np.bincount(block, weights=value_PN.ravel()) / np.bincount(block)
    result_PN: Array = means[block].reshape(value_PN.shape)
    return result_PN


def _check_scores(scores: ArrayLike, name: str, like: Array | None = None) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; pass two dimensions, prompts first")
    if like is not None and array.shape != like.shape:
        fault = f"{name} has shape {array.shape} but proxy has shape {like.shape}"
        raise ValueError(f"{fault}; join both tables on (prompt_id, sample_id) first")
    is_bad = ~np.isfinite(array)
    if is_bad.any():
        index = tuple(np.argwhere(is_bad)[0].tolist())
        fault = f"{name} holds {is_bad.sum()} NaN or infinite score(s), first {array[index]}"
        raise ValueError(f"{fault} at index {index}; score again, or split pools by their size")
    return array


def _check_n(n: ArrayLike, name: str, most: float = math.inf, why: str = POOL_SIZE) -> Array:
    """n as float64, same shape, checked to be whole numbers with 1 <= n <= most."""
    array = np.asarray(n)
    values = array.ravel().tolist()
    for at, value in enumerate(values):
        label = f"{name}={value!r}" if array.ndim == 0 else f"{name}[{at}]={value!r}"
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
            raise ValueError(f"{label} is not an integer; pass whole numbers of samples")
        if value < 1:
            raise ValueError(f"{label} is below 1; best-of-n needs at least one sample")
        if value > most:
            raise ValueError(f"{label} exceeds {most}, {why}; draw more samples or lower n")
    return array.astype(np.float64)


def _check_ns(ns: ArrayLike, most: int, why: str = POOL_SIZE) -> NDArray[np.int64]:
    """ns as int64 [K]; a single n counts as K = 1."""
    array = _check_n(ns, "ns", most, why)
    if array.ndim > 1:
        raise ValueError(f"ns has shape {array.shape}; pass one dimension of values of n")
    return np.atleast_1d(array).astype(np.int64)
